"""The parity check passes where forests are right, and catches models for which they cannot be."""

from __future__ import annotations

import pytest
import torch

from tests.support.models import tiny_model
from tests.support.trees import random_trees
from tunesmith.engine.attention import NAME, ordinary_attention
from tunesmith.engine.engine import Engine
from tunesmith.engine.layout import ForestLayout
from tunesmith.engine.parity import check_parity, checked_engine
from tunesmith.engine.plain import plain_logprobs
from tunesmith.errors import ResourceError

SHAPES = ((5, (7, 4)), (3, (6, 5)), (8, (9, 3)), (4, (5, 5)), (2, (20, 17)))


def test_a_llama_passes_with_its_longest_row() -> None:
    model = tiny_model("llama")
    report = check_parity(model, random_trees(SHAPES, vocabulary=96))
    assert report.passed
    assert report.longest_tokens == 22
    assert report.error < 1e-5
    assert report.leak == 0
    assert "passed" in report.line()


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mamba", {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 96, "state_size": 4}),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}),  # a short convolution over the flat sequence
    ],
)
def test_models_that_mix_along_the_sequence_fall_back(family: str, changes: dict[str, object]) -> None:
    model = tiny_model(family, **changes)
    trees = random_trees(SHAPES, vocabulary=96)
    engine, report = checked_engine(model, trees)
    assert not report.passed
    assert engine.backend == "plain"
    assert "row of its own" in report.line()
    plain = plain_logprobs(model, trees)
    assert torch.equal(engine.logprobs(trees).logprob_N, plain.logprob_N)


def test_a_leak_between_trees_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")

    def leaky(self: ForestLayout, num_queries: int, num_keys: int, *_: object) -> None:
        return None  # is_causal, aligned top-left: wrong for every further branch

    monkeypatch.setattr(ForestLayout, "mask", leaky)
    assert not check_parity(model, random_trees(SHAPES, vocabulary=96)).passed


def test_the_models_own_attention_and_mode_are_back_afterwards() -> None:
    model = tiny_model("llama").train()
    before = model.config._attn_implementation
    check_parity(model, random_trees(SHAPES, vocabulary=96))
    assert model.config._attn_implementation == before
    assert model.training


def test_generation_through_the_forest_attention_is_refused() -> None:
    model = tiny_model("llama")
    Engine(model).logprobs(random_trees(SHAPES, vocabulary=96))
    with pytest.raises(RuntimeError, match="ordinary_attention"):
        model(input_ids=torch.tensor([[3, 4, 5]]))
    with ordinary_attention(model):
        model(input_ids=torch.tensor([[3, 4, 5]]))
    assert model.config._attn_implementation == NAME


def test_a_full_memory_is_said_and_is_no_verdict_on_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 156498672 bytes.")

    monkeypatch.setattr("tunesmith.engine.parity.plain_logprobs", full)
    with pytest.raises(ResourceError, match="memory ran out in the parity check"):
        check_parity(tiny_model("llama"), random_trees(SHAPES, vocabulary=96))
