"""A reward model's scores against plain transformers: read at the last real token, whatever the padding (TRAPS 53)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import PreTrainedModel

from tests.support.folders import make_tokenizer
from tests.support.models import tiny_reward_model
from tests.support.training import MACHINE, assert_gradients_equal, gradients_of, pair_trees, reward_engine
from tunesmith.data.ending import at_end
from tunesmith.data.types import Branch, RowError, Tree
from tunesmith.engine.attention import ordinary_attention
from tunesmith.engine.engine import Backend, Engine
from tunesmith.model.reward import choose_pad
from tunesmith.objectives.reward import reward
from tunesmith.train.evaluate import evaluate
from tunesmith.train.step import Batch, accumulate

TREES = [at_end(tree) for tree in pair_trees(6)]


def rows_of(trees: list[Tree]) -> list[list[int]]:
    return [[*tree.prompt_ids.tolist(), *branch.ids.tolist()] for tree in trees for branch in tree.branches]


@torch.no_grad()
def pooled(model: PreTrainedModel, rows: list[list[int]], *, side: str, pad: int | None) -> Tensor:
    """Scores as plain transformers gives them for a padded batch; without a padding token row by row."""
    if pad is None:
        with ordinary_attention(model):
            return torch.cat([model(input_ids=torch.tensor([row])).logits[0] for row in rows])
    longest = max(map(len, rows))
    gaps = [[pad] * (longest - len(row)) for row in rows]
    ids = [gap + row if side == "left" else row + gap for gap, row in zip(gaps, rows, strict=True)]
    real = [[0] * len(gap) + [1] * len(row) for gap, row in zip(gaps, rows, strict=True)]
    mask = torch.tensor([each if side == "left" else each[::-1] for each in real])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with ordinary_attention(model):
        output = model(input_ids=torch.tensor(ids), attention_mask=mask, position_ids=positions)
    scores: Tensor = output.logits[:, 0]
    return scores


@pytest.mark.parametrize("backend", ["sdpa", "plain"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt2"])
def test_scores_are_plain_transformers(family: str, backend: Backend) -> None:
    longer = {"n_positions": 128} if family == "gpt2" else {}
    model = tiny_reward_model(family, **longer)
    model.config.pad_token_id = 0
    trees = [_without(tree, 0) for tree in TREES]
    with torch.no_grad():
        score_B = Engine(model, backend).logprobs(trees).logprob_N
    for side in ("left", "right"):
        assert_close(score_B, pooled(model, rows_of(trees), side=side, pad=0), atol=2e-6, rtol=1e-5)


def _without(tree: Tree, token: int) -> Tree:
    """The tree with another token in place of `token`, which is for padding."""
    branches = tuple(Branch(np.where(b.ids == token, 3, b.ids).astype(np.int32), b.trained) for b in tree.branches)
    return Tree(tree.id, np.where(tree.prompt_ids == token, 3, tree.prompt_ids).astype(np.int32), branches)


def test_where_padding_is_the_token_that_ends_answers_another_one_is_named() -> None:
    """transformers would read at the token before the end; the saved configuration must not let it."""
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    eos = tokenizer.eos_token_id
    assert isinstance(eos, int)
    model = tiny_reward_model("llama", vocab_size=len(tokenizer))
    trees = [_ending(tree, eos) for tree in TREES]
    with torch.no_grad():
        score_B = Engine(model).logprobs(trees).logprob_N
    model.config.pad_token_id = eos
    assert float((score_B - pooled(model, rows_of(trees), side="right", pad=eos)).abs().min()) > 1e-4  # the trap
    choose_pad(model, tokenizer, (eos,))
    pad = model.config.pad_token_id
    assert pad not in (None, eos)
    assert tokenizer.pad_token_id == pad
    for side in ("left", "right"):
        rows = [[5 if each == pad else each for each in row] for row in rows_of(trees)]
        assert rows == rows_of(trees)  # the rows hold none of it
        assert_close(score_B, pooled(model, rows, side=side, pad=pad), atol=2e-6, rtol=1e-5)


def _ending(tree: Tree, eos: int) -> Tree:
    """Tokens from 10 on, each answer ended by `eos`."""
    branches = tuple(
        Branch(np.array([*(10 + branch.ids[:-1] % 80), eos], np.int32), branch.trained) for branch in tree.branches
    )
    return Tree(tree.id, (10 + tree.prompt_ids % 80).astype(np.int32), branches)


def test_without_any_other_token_none_is_named_and_rows_go_one_by_one() -> None:
    tokenizer = make_tokenizer()
    model = tiny_reward_model("llama", vocab_size=len(tokenizer))
    choose_pad(model, tokenizer, tuple(tokenizer.added_tokens_decoder))
    assert model.config.pad_token_id is None
    with torch.no_grad():
        score_B = Engine(model).logprobs(TREES).logprob_N
    assert_close(score_B, pooled(model, rows_of(TREES), side="right", pad=None), atol=2e-6, rtol=1e-5)


ENGINE = reward_engine()
SIZE = 2e-4
"""Of a step of the finite differences."""


def gradients(forest_tokens: int, tree_tokens: int | None = None) -> dict[str, Tensor]:
    ENGINE.model.eval()
    accumulate(
        ENGINE,
        Batch(TREES),
        objective=reward(centering=0.1),
        forest_tokens=forest_tokens,
        tree_tokens=tree_tokens,
        machine=MACHINE,
    )
    return gradients_of(ENGINE)


def test_splits_do_not_change_the_gradient_and_the_head_has_one() -> None:
    whole = gradients(10_000)
    assert float(whole["score.modules_to_save.default.weight"].abs().max()) > 0
    assert_gradients_equal(gradients(1), whole)
    assert_gradients_equal(gradients(90), whole)
    assert_gradients_equal(gradients(40, tree_tokens=40), whole)  # branch by branch


def test_finite_differences() -> None:
    found = gradients(10_000)
    weights = {key: p for key, p in ENGINE.model.named_parameters() if key in found}
    generator = torch.Generator().manual_seed(0)
    steps = {key: torch.randn(p.shape, generator=generator) for key, p in weights.items()}
    expected = sum(float((found[key] * step).double().sum()) for key, step in steps.items())
    losses = []
    for sign in (1, -2):
        with torch.no_grad():
            for key, parameter in weights.items():
                parameter.add_(steps[key], alpha=sign * SIZE)
        loss = evaluate(ENGINE, Batch(TREES), objective=reward(centering=0.1), forest_tokens=10_000, machine=MACHINE)[
            "loss"
        ]
        assert isinstance(loss, float)
        losses.append(loss)
    with torch.no_grad():
        for key, parameter in weights.items():
            parameter.add_(steps[key], alpha=SIZE)
    assert (losses[0] - losses[1]) / (2 * SIZE) == pytest.approx(expected, rel=0.02)


def test_the_mark_is_the_last_token_and_one_token_alone_is_refused() -> None:
    assert [branch.trained.tolist() for branch in TREES[2].branches] == [[True], [False] * 11 + [True]]
    alone = Tree("x", np.zeros(0, np.int32), (Branch(np.array([4], np.int32), np.ones(1, np.bool_)),))
    with pytest.raises(RowError, match="nothing to score"):
        at_end(alone)
