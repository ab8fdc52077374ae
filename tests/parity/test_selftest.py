"""The self-test passes on a sound machine, and every one of its proofs can fail: each is broken here on purpose."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.support.optional import needs_bitsandbytes
from tests.support.slow_losses import branch_logprobs
from tunesmith.engine import sdpa
from tunesmith.engine.attention import KERNELS
from tunesmith.engine.layout import ForestLayout
from tunesmith.engine.logprobs import Logprobs
from tunesmith.model.machine import Machine
from tunesmith.objectives import Objective, Result, Sum, dpo, supervised
from tunesmith.selftest import attention, kernels, precision, quantized, reference, run, steps
from tunesmith.selftest.inputs import mixed_trees, small_model
from tunesmith.selftest.proof import Proof, Verdict
from tunesmith.train import step
from tunesmith.train.step import Batch, StepResult

CPU = torch.device("cpu")
Patch = pytest.MonkeyPatch

torch.set_num_threads(1)


def verdicts(proofs: Iterator[Proof]) -> dict[str, Verdict]:
    found = [(proof.name, proof.verdict) for proof in proofs]
    assert len(dict(found)) == len(found), "two proofs of one name"
    return dict(found)


def failed(proofs: Iterator[Proof]) -> set[str]:
    return {name for name, verdict in verdicts(proofs).items() if verdict == "FAILED"}


def test_everything_holds_here_and_nothing_is_absent() -> None:
    outcomes = list(run.self_test(CPU, torch.bfloat16))
    assert [outcome.chapter for outcome in outcomes] == list(run.CHAPTERS)
    found = verdicts(proof for outcome in outcomes for proof in outcome.proofs)
    wrong = [proof for outcome in outcomes for proof in outcome.proofs if proof.verdict == "FAILED"]
    assert not wrong
    for name in (
        *(f"{method}: {what}" for method in ("sft", "completion", "dpo", "dpo, smoothed") for what in OBJECTIVE_PROOFS),
        *(f"sdpa, {family}, {kind}: leak" for family in FAMILIES for kind in ("float32", "bfloat16")),
        "prefix sharing: gradient",
        "checkpointing: full",
        "a step twice",
        "bfloat16 inputs: log-probs",
    ):
        assert found[name] == "passed"
    for backend in ("varlen", "flex"):  # passed or skipped, but there
        for family in FAMILIES:
            assert any(name.startswith(f"{backend}, {family}, bfloat16") for name in found)


OBJECTIVE_PROOFS = ("loss", "gradient", "micro-batches", "order")
FAMILIES = ("llama", "qwen3", "gemma2")


def test_the_reference_is_a_llama() -> None:
    """Written from the papers, it agrees with transformers in float64 to what transformers' float32 norms leave."""
    model = small_model("llama", CPU).double()
    weights = reference.float64_weights(model)
    for tree in mixed_trees():
        for found, expected in zip(reference.branch_logprobs(weights, tree), branch_logprobs(model, tree), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


# --- log-probs


def test_a_coarse_softmax_is_seen(monkeypatch: Patch) -> None:
    def coarse(hidden_NH: Tensor, target_N: Tensor, head: Any) -> Tensor:
        logits_NV = head.logits(hidden_NH).bfloat16()
        return logits_NV.log_softmax(-1).gather(-1, target_N[:, None]).squeeze(-1).float()

    monkeypatch.setattr(precision, "token_logprobs", coarse)
    proofs = verdicts(precision.precision_proofs(CPU, torch.float32))
    assert set(proofs.values()) == {"FAILED"}
    assert len(proofs) == 9


def test_a_wrong_gradient_of_the_softmax_is_seen(monkeypatch: Patch) -> None:
    right = precision.token_logprobs
    monkeypatch.setattr(precision, "token_logprobs", lambda *given: scaled_gradient(right(*given), 1.01))
    found = failed(precision.precision_proofs(CPU, torch.float32))
    assert found == {f"{head}: gradient" for head in precision.HEADS}


def scaled_gradient(values: Tensor, factor: float) -> Tensor:
    """The same values with another gradient."""
    return values.detach() + factor * (values - values.detach())


# --- objectives


def test_a_dropped_label_smoothing_is_seen(monkeypatch: Patch) -> None:
    monkeypatch.setattr(steps, "dpo", lambda beta, label_smoothing=0.0: dpo(beta))
    assert failed(steps.objective_proofs(CPU)) == {"dpo, smoothed: loss", "dpo, smoothed: gradient"}


def test_another_beta_is_seen(monkeypatch: Patch) -> None:
    monkeypatch.setattr(steps, "dpo", lambda beta, label_smoothing=0.0: dpo(1.0001 * beta, label_smoothing))
    assert {"dpo: gradient", "dpo, smoothed: gradient"} <= failed(steps.objective_proofs(CPU))


def test_a_gradient_of_one_percent_too_much_is_seen(monkeypatch: Patch) -> None:
    right = steps.accumulate

    def wrong(engine: Any, batch: Batch, **given: Any) -> StepResult:
        result = right(engine, batch, **given)
        for parameter in engine.model.parameters():
            parameter.grad *= 1.01
        return result

    monkeypatch.setattr(steps, "accumulate", wrong)
    found = failed(steps.objective_proofs(CPU))
    assert found == {f"{case.name}: gradient" for case in steps.cases()}


def test_an_untrained_token_that_is_read_is_seen(monkeypatch: Patch) -> None:
    """The loss is right for the trees that it was given; the reference reads other masks."""

    sft = steps.cases()[0]
    trees = [
        replace(tree, branches=tuple(replace(one, trained=np.ones_like(one.trained)) for one in tree.branches))
        for tree in sft.batch.trees
    ]
    monkeypatch.setattr(steps, "cases", lambda: [replace(sft, batch=Batch(trees))])
    assert failed(steps.objective_proofs(CPU)) == {"sft: loss", "sft: gradient"}


# --- splits


def test_a_mean_of_means_is_seen(monkeypatch: Patch) -> None:
    def mean(logprobs: Logprobs) -> Result:
        return Result(Sum(-logprobs.logprob_N.mean(), logprobs.logprob_N.numel()))

    def wrong(name: str) -> Objective:
        return replace(supervised(name), function=mean)

    monkeypatch.setattr(steps, "supervised", wrong)
    found = failed(steps.split_proofs(CPU))
    assert {"sft: micro-batches", "sft: order", "completion: micro-batches", "completion: order"} == found


def test_references_that_stay_when_trees_move_are_seen(monkeypatch: Patch) -> None:
    right = steps.step

    def wrong(model: PreTrainedModel, case: steps.Case, device: torch.device, **given: Any) -> Any:
        if case.batch.trees[0].id != "tree-0" and case.batch.references is not None:
            pairs = zip(case.batch.trees, case.batch.references, strict=True)
            flat = np.concatenate([one for _, one in sorted(pairs, key=lambda pair: pair[0].id)])  # as they lay before
            ends = np.cumsum([len(one) for one in case.batch.references])
            case = replace(case, batch=Batch(case.batch.trees, np.split(flat, ends[:-1])))
        return right(model, case, device, **given)

    monkeypatch.setattr(steps, "step", wrong)
    assert failed(steps.split_proofs(CPU)) == {"dpo: order", "dpo, smoothed: order"}


def test_wrong_coefficients_of_trees_taken_apart_are_seen(monkeypatch: Patch) -> None:
    right = step._coefficients
    monkeypatch.setattr(step, "_coefficients", lambda *given: 1.01 * right(*given))
    assert failed(steps.split_proofs(CPU)) == {"dpo: branches apart", "dpo, smoothed: branches apart"}


# --- attention


def leaking(query: Tensor, key: Tensor, value: Tensor, layout: ForestLayout, **given: Any) -> Tensor:
    """Plain causal attention over the flat sequence: every tree sees those before it."""
    given.pop("window"), given.pop("softcap"), given.pop("dropout")
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=True, scale=given["scale"]
    )
    return out.transpose(1, 2)


def test_a_leak_between_trees_is_seen(monkeypatch: Patch) -> None:
    monkeypatch.setitem(KERNELS, "sdpa", leaking)
    found = failed(attention.attention_proofs(CPU, torch.float32))
    assert found == {
        f"sdpa, {family}, float32: {what}" for family in FAMILIES for what in ("log-probs", "gradient", "leak")
    }  # and not one of flex's
    assert failed(steps.prefix_proofs(CPU)) == {"prefix sharing: log-probs", "prefix sharing: gradient"}
    assert "sft: loss" in failed(steps.objective_proofs(CPU))


def test_a_leak_below_the_tolerance_of_half_precision_is_seen(monkeypatch: Patch) -> None:
    def faint(query: Tensor, key: Tensor, value: Tensor, layout: ForestLayout, **given: Any) -> Tensor:
        # the last token of the forest is mixed into all others
        return sdpa.attend(query, key, value + 0.01 * value[:, :, -1:], layout, **given)

    monkeypatch.setitem(KERNELS, "sdpa", faint)
    monkeypatch.setattr(attention, "FAMILIES", ("llama",))
    found = failed(attention.attention_proofs(CPU, torch.bfloat16))
    assert "sdpa, llama, bfloat16: log-probs" not in found
    assert "sdpa, llama, bfloat16: leak" in found


def test_a_wrong_gradient_of_attention_is_seen(monkeypatch: Patch) -> None:
    monkeypatch.setitem(KERNELS, "sdpa", lambda *given, **more: scaled_gradient(sdpa.attend(*given, **more), 1.01))
    found = failed(attention.attention_proofs(CPU, torch.float32))
    assert found == {f"sdpa, {family}, float32: gradient" for family in FAMILIES}


@pytest.mark.parametrize(("dropped", "families"), [("window", {"gemma2"}), ("softcap", {"gemma2"})])
def test_an_ignored_window_or_cap_is_seen(monkeypatch: Patch, dropped: str, families: set[str]) -> None:
    monkeypatch.setitem(KERNELS, "sdpa", lambda *given, **more: sdpa.attend(*given, **(more | {dropped: None})))
    found = failed(attention.attention_proofs(CPU, torch.float32))
    assert found == {f"sdpa, {family}, float32: {what}" for family in families for what in ("log-probs", "gradient")}


def test_a_trial_that_moves_nothing_is_no_proof(monkeypatch: Patch) -> None:
    monkeypatch.setattr(attention, "_changed", lambda tree, branches, prompt: tree)
    model = small_model("llama", CPU)
    assert attention.largest_leak(model, "sdpa", mixed_trees()) == float("inf")


def test_a_wrong_fused_kernel_is_seen(monkeypatch: Patch) -> None:
    def wrong(model: PreTrainedModel, choice: str) -> str:
        norm = model.base_model.norm
        right = norm.forward
        norm.forward = lambda hidden: 1.001 * right(hidden)
        return "kernels: Liger's rms_norm"

    monkeypatch.setattr(kernels, "apply_kernels", wrong)
    found = verdicts(kernels.kernel_proofs(CPU, torch.float32))
    assert len(found) == 6
    assert set(found.values()) == {"FAILED"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="says why the kernels cannot run without a card")
def test_kernels_that_cannot_run_are_skipped_with_the_reason() -> None:
    found = list(kernels.kernel_proofs(CPU, torch.float32))
    assert [proof.verdict for proof in found] == ["skipped"] * 3
    assert all(proof.reason.startswith("Liger's kernels cannot be used: ") for proof in found)


# --- sharing


def test_a_branch_that_goes_on_behind_its_sibling_is_seen(monkeypatch: Patch) -> None:
    right = ForestLayout.mask

    # as is_causal does where the lengths differ: aligned top-left
    def wrong(self: ForestLayout, num_queries: int, num_keys: int, window: int | None, like: Tensor) -> Tensor | None:
        mask_QK = right(self, num_queries, num_keys, window, like)
        if mask_QK is None or num_queries == num_keys:
            return mask_QK
        hidden_QK = torch.ones(num_queries, num_keys, dtype=torch.bool).triu(1)
        return torch.zeros(num_queries, num_keys).masked_fill(hidden_QK, float("-inf"))

    monkeypatch.setattr(ForestLayout, "mask", wrong)
    assert failed(steps.prefix_proofs(CPU)) == {"prefix sharing: log-probs", "prefix sharing: gradient"}


# --- checkpointing, repetition


def test_a_recomputation_that_differs_is_seen(monkeypatch: Patch) -> None:
    right = steps.training_mode

    @contextmanager
    def wrong(model: PreTrainedModel, **given: Any) -> Iterator[None]:
        def scale(module: torch.nn.Module, into: tuple[Tensor, ...], out: object) -> tuple[Tensor | None, ...]:
            return tuple(None if gradient is None else 1.01 * gradient for gradient in into)

        layer = model.base_model.layers[1]
        handle = layer.register_full_backward_hook(scale) if given["gradient_checkpointing"] == "full" else None
        with right(model, **given):
            yield
        if handle is not None:
            handle.remove()

    monkeypatch.setattr(steps, "training_mode", wrong)
    assert failed(steps.checkpointing_proofs(CPU)) == {"checkpointing: full"}


def test_dropout_that_is_not_keyed_is_seen(monkeypatch: Patch) -> None:
    def unseeded(self: Machine, key: str) -> AbstractContextManager[None]:
        return nullcontext()

    monkeypatch.setattr(Machine, "seeded", unseeded)
    assert failed(steps.repeat_proofs(CPU)) == {"a step twice"}


# --- quantized bases


@needs_bitsandbytes
def test_the_reference_of_another_base_is_seen(monkeypatch: Patch) -> None:
    first: list[list[np.ndarray]] = []
    right: Callable[..., list[np.ndarray]] = quantized.score

    def always_the_first(*given: Any, **more: Any) -> list[np.ndarray]:
        first.append(right(*given, **more))
        return first[0]

    monkeypatch.setattr(quantized, "score", always_the_first)
    assert failed(quantized.quantized_proofs(CPU)) == {"nf4 base", "int8 base"}


@needs_bitsandbytes
def test_a_base_that_was_not_quantized_proves_nothing(monkeypatch: Patch) -> None:
    right = quantized.load_model

    def plain(settings: Any, **given: Any) -> PreTrainedModel:
        return right(settings.model_copy(update={"quantization": "none"}), **given)

    monkeypatch.setattr(quantized, "load_model", plain)
    assert failed(quantized.quantized_proofs(CPU)) == {"nf4 base", "int8 base"}


def test_without_bitsandbytes_the_proofs_are_skipped(monkeypatch: Patch) -> None:
    monkeypatch.setattr(quantized, "find_spec", lambda name: None)
    assert set(verdicts(quantized.quantized_proofs(CPU)).values()) == {"skipped"}


# --- the run


def test_a_chapter_that_breaks_off_keeps_what_it_had_and_fails(monkeypatch: Patch) -> None:
    def breaking(device: torch.device, dtype: torch.dtype) -> Iterator[Proof]:
        yield Proof("first", "", 0.0, 1.0)
        raise RuntimeError("no such kernel")

    chapter = replace(run.CHAPTERS[0], proofs=breaking)
    monkeypatch.setattr(run, "CHAPTERS", (chapter,))
    (outcome,) = run.self_test(CPU, torch.float32)
    assert [proof.verdict for proof in outcome.proofs] == ["passed", "FAILED"]
    assert outcome.proofs[1].reason == "RuntimeError: no such kernel"
