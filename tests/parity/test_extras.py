"""What a few methods read of a token's distribution, against whole rows of float64 logits, under every kind of head."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.testing import assert_close
from transformers import PreTrainedModel

from tests.support.models import tiny_model
from tests.support.training import MACHINE, pair_trees
from tunesmith.data.types import Tree
from tunesmith.engine import logprobs
from tunesmith.engine.attention import ordinary_attention
from tunesmith.engine.engine import Engine
from tunesmith.engine.extras import of_logits
from tunesmith.engine.logprobs import Extra
from tunesmith.model.adapters import add_adapter, inner_model
from tunesmith.model.added_tokens import AddedTokens, make_room
from tunesmith.recipe.models import Lora
from tunesmith.train.step import Batch, values

WANTS: tuple[Extra, ...] = ("mean", "collision")
HEADS = {
    "linear": "llama",
    "scaled": "granite",
    "multiplied": "cohere2",
    "softcap": "gemma2",
    "biased": "phi",
    "trained": "llama",
    "biased, trained": "phi",
    "softcap, trained": "gemma2",
    "adapted": "llama",
    "softcap, adapted": "gemma2",
    "trained rows": "llama",
    "trained rows, tied": "llama",
}
TREES = pair_trees(5)


def model_of(kind: str) -> PreTrainedModel:
    """A tiny model whose head is of this kind, every trained weight away from where it starts."""
    changes = {"tie_word_embeddings": True} if kind.endswith("tied") else {}
    model = tiny_model(HEADS[kind], **changes)
    if kind.endswith("trained"):
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        return model
    adapted: PeftModel
    if kind.endswith("adapted"):
        adapted = add_adapter(model, Lora(r=4, target_modules=["q_proj", "lm_head"]), seed=0)
    elif kind.startswith("trained rows"):
        added = AddedTokens(("<a>", "<b>"), (96, 97))
        make_room(model, 98, added)
        adapted = add_adapter(model, Lora(r=4), seed=0, added=added)
    else:
        adapted = add_adapter(model, Lora(r=4), seed=0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return inner_model(adapted)


def trees_of(kind: str) -> list[Tree]:
    """Rows; where there are added tokens, some of the trained ones are those."""
    if not kind.startswith("trained rows"):
        return TREES
    trees = []
    for tree in TREES:
        branches = []
        for branch in tree.branches:
            ids = branch.ids.copy()
            ids[::3] = 96 + np.arange(len(ids[::3])) % 2
            branches.append(replace(branch, ids=ids))
        trees.append(replace(tree, branches=tuple(branches)))
    return trees


def slow(model: PreTrainedModel, trees: list[Tree]) -> dict[str, Tensor]:
    """Answer by answer through the model's own forward in float64: (1/V) sum_v log p(v), and log sum_v p(v)^2."""
    mean, collision = [], []
    with ordinary_attention(model):
        for tree in trees:
            for branch in tree.branches:
                ids_L = torch.from_numpy(np.concatenate([tree.prompt_ids, branch.ids]).astype(np.int64))
                logits_LV = model(input_ids=ids_L[None], use_cache=False).logits[0]
                assert logits_LV.dtype == torch.float64
                for place in np.flatnonzero(branch.trained) + len(tree.prompt_ids):
                    logprob_V = logits_LV[place - 1] - torch.logsumexp(logits_LV[place - 1], 0)
                    mean.append(logprob_V.mean())
                    collision.append((logprob_V.detach().exp() ** 2).sum().log())
    return {"mean": torch.stack(mean), "collision": torch.stack(collision)}


def gradients(model: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    wanted = {name: each for name, each in model.named_parameters() if each.requires_grad}
    found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    return {
        name: torch.zeros_like(each) if grad is None else grad
        for (name, each), grad in zip(wanted.items(), found, strict=True)
    }


def assert_close_to(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    largest = max(float(tensor.norm()) for tensor in expected.values())
    assert largest > 0
    for name, tensor in expected.items():
        assert float((found[name].double() - tensor).norm()) <= 1e-4 * max(float(tensor.norm()), 1e-2 * largest), name


@pytest.mark.parametrize("kind", HEADS)
def test_values_and_gradient_are_those_of_whole_rows_of_logits(kind: str) -> None:
    model, trees = model_of(kind), trees_of(kind)
    wide = copy.deepcopy(model).double()
    expected = slow(wide, trees)
    weight_N = torch.randn(len(expected["mean"]), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    slope = gradients(wide, (expected["mean"] * weight_N).sum())
    found = Engine(model).logprobs(trees, WANTS)
    for name in WANTS:
        assert found.extras[name].dtype == torch.float32
        assert_close(found.extras[name].double(), expected[name].detach(), rtol=0, atol=2e-5)
    assert not found.extras["collision"].requires_grad
    assert_close_to(gradients(model, (found.extras["mean"] * weight_N.float()).sum()), slope)


def test_one_answer_at_a_time_gives_the_same() -> None:
    model = model_of("linear")
    for backend in ("sdpa", "plain"):
        found = Engine(model, backend=backend).logprobs(TREES, WANTS)  # type: ignore[arg-type]
        expected = slow(copy.deepcopy(model).double(), TREES)
        for name in WANTS:
            assert_close(found.extras[name].double(), expected[name].detach(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ["linear", "adapted"])
def test_a_step_puts_them_at_their_places_in_any_split(kind: str) -> None:
    engine, batch = Engine(model_of(kind)), Batch(TREES)
    expected = slow(copy.deepcopy(engine.model).double(), TREES)
    for forest_tokens in (1, 90, 10_000):
        value_NE = values(engine, batch, wants=WANTS, forest_tokens=forest_tokens, machine=MACHINE)
        for column, name in enumerate(WANTS, start=1):
            assert_close(value_NE[:, column].double(), expected[name].detach(), rtol=0, atol=2e-5)


def test_a_sharp_distribution_loses_nothing() -> None:
    """One token has all the probability: its collision is 0, and the mean is far below."""
    logits_NV = torch.zeros(1, 50)
    logits_NV[0, 3] = 60.0
    found = of_logits(logits_NV, WANTS)
    assert float(found["collision"]) == pytest.approx(0.0, abs=1e-6)
    assert float(found["mean"]) == pytest.approx(-60 * 49 / 50, rel=1e-6)


def test_half_precision_is_near() -> None:
    """bfloat16 products, float32 sums: within what bf16 logits of this size can say."""
    model = model_of("linear")
    expected = slow(copy.deepcopy(model).double(), TREES)
    found = Engine(model, autocast=torch.bfloat16).logprobs(TREES, WANTS)
    for name in WANTS:
        assert found.extras[name].dtype == torch.float32
        assert_close(found.extras[name].double(), expected[name].detach(), rtol=0, atol=0.1)


@pytest.mark.parametrize("kind", ["linear", "softcap, adapted", "trained rows"])
def test_chunks_do_not_change_them(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, trees = model_of(kind), trees_of(kind)
    whole = Engine(model).logprobs(trees, WANTS)
    slope = gradients(model, whole.extras["mean"].sum())
    monkeypatch.setitem(logprobs.CHUNK_BYTES, "cpu", 3 * 4 * 100)  # three rows of logits
    parts = Engine(model).logprobs(trees, WANTS)
    for name in WANTS:
        assert_close(parts.extras[name], whole.extras[name], rtol=0, atol=1e-5)
    found = gradients(model, parts.extras["mean"].sum())
    assert_close_to(found, {name: each.double() for name, each in slope.items()})
