"""How trees are packed, ordered, split or accompanied never changes their log-probs (TRAPS 26, 34 to 39)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.models import tiny_model
from tests.support.trees import random_tree, random_trees
from tunesmith.data.plan import plan_forests
from tunesmith.engine.engine import Engine
from tunesmith.engine.plain import plain_logprobs

MODELS = {family: tiny_model(family) for family in ("llama", "gpt2", "mistral")}  # gpt2: RoPE would hide positions
TREES = random_trees(((5, (7, 4)), (1, (3, 9)), (6, (1, 1)), (9, (4, 12)), (3, (2, 5)), (12, (6, 3))), vocabulary=96)


def _by_tree(engine: Engine, forests: list[list[int]]) -> dict[int, torch.Tensor]:
    found: dict[int, torch.Tensor] = {}
    with torch.no_grad():
        for numbers in forests:
            logprobs = engine.logprobs([TREES[number] for number in numbers])
            tree_N = logprobs.tree_B[logprobs.branch_N]
            for place, number in enumerate(numbers):
                found[number] = logprobs.logprob_N[tree_N == place]
    return found


@pytest.mark.parametrize("family", sorted(MODELS))
@pytest.mark.parametrize("forest_tokens", [1, 20, 40, 1000])
def test_every_split_gives_what_each_tree_gives_alone(family: str, forest_tokens: int) -> None:
    engine = Engine(MODELS[family])
    alone = _by_tree(engine, [[number] for number in range(len(TREES))])
    packed = _by_tree(engine, plan_forests(TREES, forest_tokens))
    for number, values_N in alone.items():
        torch.testing.assert_close(packed[number], values_N, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", sorted(MODELS))
def test_other_orders_agree_to_rounding(family: str) -> None:
    engine = Engine(MODELS[family])
    forward, backward = _by_tree(engine, [[0, 1, 2, 3, 4, 5]]), _by_tree(engine, [[5, 4, 3, 2, 1, 0]])
    for number in range(len(TREES)):
        torch.testing.assert_close(forward[number], backward[number], rtol=1e-5, atol=1e-5)


def test_a_changed_tree_moves_no_other_by_a_single_bit() -> None:
    engine = Engine(MODELS["llama"])
    before = _by_tree(engine, [[0, 1, 2]])
    changed = [TREES[0], random_tree(1, (3, 9), vocabulary=96, seed=77), TREES[2]]
    with torch.no_grad():
        logprobs = engine.logprobs(changed)
    tree_N = logprobs.tree_B[logprobs.branch_N]
    assert torch.equal(logprobs.logprob_N[tree_N == 0], before[0])
    assert torch.equal(logprobs.logprob_N[tree_N == 2], before[2])
    assert not torch.allclose(logprobs.logprob_N[tree_N == 1], before[1], atol=1e-2)


@settings(max_examples=25, deadline=None)
@given(
    shapes=st.lists(
        st.tuples(st.integers(0, 9), st.lists(st.integers(1, 9), min_size=1, max_size=4)), min_size=1, max_size=4
    ),
    untrained=st.integers(0, 2),
)
def test_any_forest_equals_the_plain_forward(shapes: list[tuple[int, list[int]]], untrained: int) -> None:
    model = MODELS["mistral"]
    trees = [
        random_tree(prompt, branches, vocabulary=96, seed=number, untrained=untrained)
        for number, (prompt, branches) in enumerate(shapes)
    ]
    with torch.no_grad():
        ours, plain = Engine(model).logprobs(trees), plain_logprobs(model, trees)
    assert ours.branch_N.tolist() == plain.branch_N.tolist()
    assert ours.tree_B.tolist() == plain.tree_B.tolist()
    torch.testing.assert_close(ours.logprob_N, plain.logprob_N, rtol=1e-5, atol=1e-5)
    assert torch.isfinite(ours.logprob_N).all()


@pytest.mark.parametrize("family", sorted(MODELS))
def test_checkpointed_layers_give_the_same_gradients(family: str) -> None:
    model = tiny_model(family).train()

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        Engine(model).logprobs(TREES).logprob_N.sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    for config_dropout in ("attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop"):
        model.config.update({config_dropout: 0.0})
    model.eval()
    wanted = gradients()
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for mine, reference in zip(gradients(), wanted, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-5)
