"""The parity check passes where forests are right, and catches models for which they cannot be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.support import flash
from tests.support.models import tiny_model
from tests.support.trees import random_trees
from tunesmith.engine import parity, sdpa, varlen
from tunesmith.engine.attention import KERNELS, NAME, ordinary_attention
from tunesmith.engine.backends import DeviceFacts, ModelFacts
from tunesmith.engine.engine import Engine
from tunesmith.engine.gradients import cut_short, farthest, gradients
from tunesmith.engine.layout import ForestLayout
from tunesmith.engine.parity import check_parity, checked_engine
from tunesmith.engine.plain import plain_logprobs
from tunesmith.errors import ModelError, ResourceError

SHAPES = ((5, (7, 4)), (3, (6, 5)), (8, (9, 3)), (4, (5, 5)), (2, (20, 17)))


def test_a_llama_passes_with_its_longest_row() -> None:
    model = tiny_model("llama")
    report = check_parity(model, random_trees(SHAPES, vocabulary=96))
    assert report.passed
    assert report.longest_tokens == 22
    assert report.error < 1e-5
    assert report.leak == 0
    assert report.gradient is not None
    assert report.gradient < 1e-5
    assert "passed, backend sdpa" in report.line()
    assert "skipped: varlen, flex (needs a CUDA device)" in report.line()


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mamba", {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 96, "state_size": 4}),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}),  # a short convolution over the flat sequence
        ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2}),  # attention sinks
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


def test_what_no_configuration_tells_is_found_by_its_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "no_forests", lambda *_: "")
    model = tiny_model("gpt_oss", num_local_experts=4, num_experts_per_tok=2)
    assert not check_parity(model, random_trees(SHAPES, vocabulary=96)).passed


def test_under_autocast_judge_and_forests_compute_in_half_precision() -> None:
    model = tiny_model("llama")
    engine, report = checked_engine(model, random_trees(SHAPES, vocabulary=96), autocast=torch.bfloat16)
    assert engine.autocast == torch.bfloat16
    assert report.passed
    assert report.tolerance == 5e-2
    assert report.gradient is not None
    assert 1e-4 < report.gradient < 1e-1  # bfloat16 rounds to 3 digits


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
    def full(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 156498672 bytes.")

    monkeypatch.setattr("tunesmith.engine.engine.plain_logprobs", full)
    with pytest.raises(ResourceError, match="memory ran out in the parity check"):
        check_parity(tiny_model("llama"), random_trees(SHAPES, vocabulary=96))


class _NoGradient(torch.autograd.Function):
    """Keys as they are, and half of their gradient: a forward that is right, and a backward that is not."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, key: Tensor) -> Tensor:
        return key.view_as(key)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
        return grad / 2


def _wrong_backward(
    query: Tensor, key: Tensor, value: Tensor, layout: ForestLayout, **settings: float | None
) -> Tensor:
    return sdpa.attend(query, _NoGradient.apply(key), value, layout, **settings)  # type: ignore[arg-type]


def test_a_wrong_backward_is_caught_where_something_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    trees = random_trees(SHAPES, vocabulary=96)
    monkeypatch.setitem(KERNELS, "sdpa", _wrong_backward)
    report = check_parity(model, trees)
    assert not report.passed
    assert "gradients differ" in report.line()
    assert report.error < 1e-5
    model.requires_grad_(False)
    report = check_parity(model, trees)
    assert report.passed
    assert report.gradient is None
    assert "gradients" not in report.line()


@pytest.mark.parametrize("part", [0, 1, 2])
def test_a_missing_part_of_the_backward_shows_by_far(part: int) -> None:
    model = tiny_model("llama")
    trees = random_trees(((40, (30, 20)), (3, (6, 5))), vocabulary=96)

    def without(query: Tensor, key: Tensor, value: Tensor, layout: ForestLayout, **settings: float | None) -> Tensor:
        inputs = [query, key, value]
        inputs[part] = inputs[part].detach()
        return sdpa.attend(*inputs, layout, **settings)  # type: ignore[arg-type]

    want = gradients(model, trees, Engine(model).logprobs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(KERNELS, "sdpa", without)
        assert farthest(gradients(model, trees, Engine(model).logprobs), want) > 0.8


def test_a_gather_that_drops_the_copies_gradient_shows_by_far(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    trees = random_trees(((40, (30, 20)), (3, (6, 5))), vocabulary=96)
    monkeypatch.setattr(varlen, "torch_kernel", lambda: flash.varlen_attn)
    want = gradients(model, trees, lambda short: plain_logprobs(model, short))
    assert farthest(gradients(model, trees, Engine(model, "varlen").logprobs), want) < 1e-5
    monkeypatch.setattr(
        varlen._Gathered,
        "backward",
        staticmethod(lambda ctx, grad_KGD: (grad_KGD.index_select(0, ctx.sequences.home_T), None)),
    )
    assert farthest(gradients(model, trees, Engine(model, "varlen").logprobs), want) > 0.5


def _on_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """An Ampere card, as far as the choice goes; flash kernels by a loop."""
    monkeypatch.setattr(DeviceFacts, "of", lambda device: DeviceFacts("cuda", (8, 0), has_varlen=True))
    monkeypatch.setattr(ModelFacts, "of", lambda model, autocast: ModelFacts(torch.bfloat16, 8))
    monkeypatch.setattr(varlen, "torch_kernel", lambda: flash.varlen_attn)


def test_auto_takes_the_next_kernel_where_one_is_wrong_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    _on_a_card(monkeypatch)
    model = tiny_model("llama")
    trees = random_trees(SHAPES, vocabulary=96)
    engine, report = checked_engine(model, trees)
    assert engine.backend == report.backend == "varlen"
    assert report.skipped == ()

    def broken(*_: object, **__: object) -> Tensor:
        raise RuntimeError("no kernel image is available for execution on the device\nsecond line")

    monkeypatch.setattr(varlen, "torch_kernel", lambda: broken)
    engine, report = checked_engine(model, trees)
    assert engine.backend == "sdpa"
    assert "varlen (RuntimeError: no kernel image is available" in report.line()
    assert "flex (needs heads of at least 16, and this model's have 8)" in report.line()
    assert "second line" not in report.line()
    with pytest.raises(ModelError, match="attention varlen cannot be used: RuntimeError: no kernel image"):
        checked_engine(model, trees, attention="varlen")


def test_a_named_kernel_that_fails_is_refused() -> None:
    model = tiny_model("lfm2", layer_types=["conv", "full_attention"])
    trees = random_trees(SHAPES, vocabulary=96)
    with pytest.raises(ModelError, match=r"attention sdpa cannot be used: .*layers of the kind conv"):
        checked_engine(model, trees, attention="sdpa")
    with pytest.raises(ModelError, match="attention varlen cannot be used: needs a CUDA device"):
        checked_engine(model, trees, attention="varlen")
    assert model.config._attn_implementation != NAME


def test_plain_by_wish_is_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunesmith.engine.engine.plain_logprobs", lambda *_: pytest.fail("a check was run"))
    engine, report = checked_engine(tiny_model("llama"), random_trees(SHAPES, vocabulary=96), attention="plain")
    assert engine.backend == "plain"
    assert report.passed
    assert "attention: plain" in report.line()


def test_rows_past_the_table_of_positions_are_refused() -> None:
    trees = random_trees(((5, (7, 4)), (30, (35, 3))), vocabulary=96)
    with pytest.raises(ModelError, match="a row of 65 tokens is longer than the model's table of 64 positions"):
        check_parity(tiny_model("gpt2"), trees)


def test_a_model_whose_own_forward_fails_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise KeyError("rope")

    monkeypatch.setattr("tunesmith.engine.engine.plain_logprobs", broken)
    with pytest.raises(ModelError, match="own forward fails on these rows"):
        check_parity(tiny_model("llama"), random_trees(SHAPES, vocabulary=96))


def test_trees_are_cut_short_for_gradients() -> None:
    trees = random_trees(((5, (7, 4)), (50, (3,)), (80, (90, 2, 40, 5))), vocabulary=96)
    first, most = cut_short(trees)
    assert [len(first.prompt_ids), *(len(branch.ids) for branch in first.branches)] == [5, 7, 4]
    assert [len(most.prompt_ids), *(len(branch.ids) for branch in most.branches)] == [32, 32, 2, 32]
    assert all(branch.trained.all() for branch in most.branches)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_gradients_of_forests_and_of_branches_one_by_one_are_the_same(family: str) -> None:
    model = tiny_model(family)
    trees = random_trees(((0, (3, 2)), (4, (5, 1, 2))), vocabulary=96)
    want = gradients(model, trees, lambda short: plain_logprobs(model, short))
    got = gradients(model, trees, Engine(model).logprobs)
    assert len(got) == len(want) >= 11  # prompts' and branches' embeddings, and matrices
    assert [len(part) for part in want[:2]] == [4, 13]
    assert farthest(got, want) < 1e-5
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_farthest_gradient_decides() -> None:
    one, two = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 1.0])
    assert farthest([one, two], [one, two]) == 0
    assert farthest([one, two * 3], [one, two]) == 2
    assert farthest([one, two], [one, two * 0]) == float("inf")
    assert farthest([one * float("nan")], [one]) == float("inf")
