"""The parity check: which kernel is right for this model, on these rows?

In: a model and a few real trees, the longest among them. Out: a report, and the engine to use.
Must not know: files, recipes, objectives.

Three questions. Do log-probs equal the plain forward's, one branch at a time? Does changing one tree (or one branch)
leave all others as they were? In low precision a tolerance alone can hide a leak. And, where something is trained, are
the gradients the plain forward's? A forward that agrees can have a wrong backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tunesmith.data.store import sizes_of
from tunesmith.data.types import Branch, Tree
from tunesmith.engine.attention import ordinary_attention
from tunesmith.engine.backends import (
    BY_SPEED,
    Attention,
    DeviceFacts,
    ModelFacts,
    candidates,
    no_forests,
    num_positions,
    refusal,
)
from tunesmith.engine.engine import Backend, Engine
from tunesmith.engine.gradients import farthest, gradients
from tunesmith.engine.layout import Kernel
from tunesmith.engine.retry import is_out_of_memory
from tunesmith.errors import ModelError, ResourceError

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest difference in a token's log-prob over the largest log-prob: some hundred roundings of the type."""
GRADIENT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-1, torch.float16: 3e-2}
"""Length of the difference over the gradient's length. Roundings alone make 1e-6, 1.5e-2 and 2e-3 (random models of 2
to 24 layers); without the keys', the queries' or a copied prompt's part of the backward it is 0.8 to 1."""
LEAK_TOLERANCE = 1e-6
"""Untouched trees run the same kernels on the same numbers: they may differ by reordered sums only."""
NUM_TREES = 4
INFINITE = float("inf")
FAULTS = (
    RuntimeError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    NotImplementedError,
    AssertionError,
    ImportError,
)
"""What a model or a kernel may raise on a forest that it cannot compute."""


@dataclass(frozen=True, slots=True)
class ParityReport:
    """What the check found. Errors of log-probs are relative to the largest log-prob of the trees.

    gradient: None where nothing is trained. skipped: kernels that would be faster, and why they are not used.
    """

    backend: Backend
    num_trees: int
    longest_tokens: int
    error: float
    leak: float
    tolerance: float
    reason: str = ""
    gradient: float | None = None
    gradient_tolerance: float = GRADIENT_TOLERANCE[torch.float32]
    skipped: tuple[tuple[Kernel, str], ...] = ()

    @property
    def passed(self) -> bool:
        """True where the backend may be used."""
        return not self.fault

    @property
    def fault(self) -> str:
        """Why the backend may not be used; empty where it may. Not a number is a fault too."""
        if self.reason:
            return self.reason
        if not self.error <= self.tolerance:
            return f"log-probs differ by {self.error:.1e}, limit {self.tolerance:.0e}"
        if not self.leak <= LEAK_TOLERANCE:
            return f"a changed answer moves others by {self.leak:.1e}, limit {LEAK_TOLERANCE:.0e}"
        if self.gradient is not None and not self.gradient <= self.gradient_tolerance:
            return f"gradients differ by {self.gradient:.1e}, limit {self.gradient_tolerance:.0e}"
        return ""

    def line(self) -> str:
        """One line for the first lines of a run."""
        if self.backend == "plain":
            return "parity: not checked: with `attention: plain` every answer runs in a row of its own"
        skipped = self._skipped_in_words()
        if not self.passed:
            return f"parity: forests fail on this model ({self.fault}): every answer runs in a row of its own{skipped}"
        what = f"{self.num_trees} trees, longest {self.longest_tokens} tokens"
        figures = f"log-probs within {self.error:.1e} (limit {self.tolerance:.0e}), leak {self.leak:.0e}"
        if self.gradient is not None:
            figures += f", gradients within {self.gradient:.1e} (limit {self.gradient_tolerance:.0e})"
        return f"parity: passed, backend {self.backend}, {what}, {figures}{skipped}"

    def _skipped_in_words(self) -> str:
        """Kernels by reason: '; skipped: varlen, flex (needs a CUDA device)'."""
        by_reason: dict[str, list[str]] = {}
        for kernel, reason in self.skipped:
            by_reason.setdefault(reason, []).append(kernel)
        parts = [f"{', '.join(kernels)} ({reason})" for reason, kernels in by_reason.items()]
        return f"; skipped: {'; '.join(parts)}" if parts else ""


@dataclass(frozen=True, slots=True, eq=False)
class _Plain:
    """The judge: what the plain forward says of the sample, and its gradients where something is trained."""

    sample: list[Tree]
    logprob_N: Tensor
    gradients: list[Tensor] | None


def _sample(trees: Sequence[Tree]) -> list[Tree]:
    """The longest tree (by its longest row) and the first few others; identical positions are taken once."""
    sizes = sizes_of(trees)
    usable = np.flatnonzero(sizes.num_trained > 1)
    if not len(usable):
        raise ModelError("no row has a trained token, so there is nothing to check or train")
    longest = int(usable[np.argmax(sizes.longest_row[usable])])
    others = [number for number in usable[:NUM_TREES].tolist() if number != longest]
    return [trees[number] for number in (*others[: NUM_TREES - 1], longest)]


def _longest(trees: Sequence[Tree]) -> int:
    return max(len(tree.prompt_ids) + max(len(branch.ids) for branch in tree.branches) for tree in trees)


def _shifted(ids: np.ndarray, vocabulary: int) -> np.ndarray:
    return ((ids + 1) % vocabulary).astype(np.int32)


def _perturb(tree: Tree, vocabulary: int, *, branch_only: bool) -> Tree:
    """The tree with other tokens: all of them, or those of its first branch."""
    branches = [
        Branch(_shifted(branch.ids, vocabulary) if number == 0 or not branch_only else branch.ids, branch.trained)
        for number, branch in enumerate(tree.branches)
    ]
    prompt_ids = tree.prompt_ids if branch_only else _shifted(tree.prompt_ids, vocabulary)
    return replace(tree, prompt_ids=prompt_ids, branches=tuple(branches))


def _leak(engine: Engine, trees: Sequence[Tree], before_N: Tensor, branch_N: Tensor) -> float:
    """Largest change in log-probs that may not change: of other trees, and of a changed branch's siblings."""
    vocabulary = engine.model.config.get_text_config().vocab_size
    first_of_last = sum(len(tree.branches) for tree in trees[:-1])
    changed = [*trees[:-1], _perturb(trees[-1], vocabulary, branch_only=True)]
    untouched_N = branch_N != first_of_last
    if len(trees) > 1:
        changed[0] = _perturb(trees[0], vocabulary, branch_only=False)
        untouched_N &= branch_N >= len(trees[0].branches)
    moved_N = (engine.logprobs(changed).logprob_N - before_N).abs()[untouched_N]
    return float(moved_N.max()) if len(moved_N) else 0.0


def _refuse_full_memory(problem: Exception, longest: int) -> None:
    """A check that did not fit says nothing about the model, and the slower path would need more memory yet."""
    if is_out_of_memory(problem):
        raise ResourceError(
            "memory ran out in the parity check, which runs the longest row through the model",
            where=f"a row of {longest} tokens",
            remedy="Lower the stage's `max_length`, or use a smaller model or `quantization: nf4`.",
        ) from problem


def _said(problem: Exception) -> str:
    return f"{type(problem).__name__}: {(str(problem).splitlines() or [''])[0][:120]}"


def _refuse_long_rows(model: PreTrainedModel, longest: int) -> None:
    """On a CUDA device a row past the table would end in an assertion that stops every later call."""
    positions = num_positions(model)
    if positions is not None and longest > positions:
        raise ModelError(
            f"a row of {longest} tokens is longer than the model's table of {positions} positions",
            where=type(model).__name__,
            remedy=f"Set the stage's `max_length` to {positions} or less.",
        )


def _judged(engine: Engine, sample: list[Tree], *, trained: bool) -> _Plain:
    """What the engine, a plain one, says of the sample. Raises ModelError where the model's own forward fails."""
    try:
        with torch.no_grad():
            logprob_N = engine.logprobs(sample).logprob_N
        wanted = gradients(engine.model, sample, engine.logprobs) if trained else None
    except FAULTS as problem:
        _refuse_full_memory(problem, _longest(sample))
        raise ModelError(
            f"the model's own forward fails on these rows ({_said(problem)})",
            where=type(engine.model).__name__,
            remedy="Check that transformers can run this model here, and the stage's `max_length`.",
        ) from problem
    return _Plain(sample, logprob_N, wanted)


def _compared(engine: Engine, plain: _Plain, kernel: Kernel) -> ParityReport:
    """What the engine, which computes by `kernel`, says of the judge's sample."""
    sample = plain.sample
    tolerance = TOLERANCE.get(engine.dtype, TOLERANCE[torch.float32])
    limit = GRADIENT_TOLERANCE.get(engine.dtype, GRADIENT_TOLERANCE[torch.float32])
    longest = _longest(sample)
    report = ParityReport(kernel, len(sample), longest, INFINITE, INFINITE, tolerance, gradient_tolerance=limit)
    try:
        with torch.no_grad():
            packed = engine.logprobs(sample)
            scale = float(plain.logprob_N.abs().max())
            error = float((packed.logprob_N - plain.logprob_N).abs().max()) / scale
            leak = _leak(engine, sample, packed.logprob_N, packed.branch_N) / scale
        report = replace(report, error=error, leak=leak)
        if plain.gradients is not None and report.passed:
            distance = farthest(gradients(engine.model, sample, engine.logprobs), plain.gradients)
            report = replace(report, gradient=distance)
    except FAULTS as problem:
        _refuse_full_memory(problem, report.longest_tokens)
        return replace(report, reason=_said(problem))
    return report


def _first_right(
    model: PreTrainedModel, sample: list[Tree], kernels: Sequence[Kernel], autocast: torch.dtype | None
) -> list[ParityReport]:
    """The reports of the kernels in turn, up to the first that passes."""
    reports: list[ParityReport] = []
    trained = any(parameter.requires_grad for parameter in model.parameters())
    was_training = model.training
    model.eval()
    try:
        with ordinary_attention(model):  # so that the model's own attention is back, whatever happens
            plain = _judged(Engine(model, "plain", autocast=autocast), sample, trained=trained)
            while not (reports and reports[-1].passed) and len(reports) < len(kernels):
                kernel = kernels[len(reports)]
                reports.append(_compared(Engine(model, kernel, autocast=autocast), plain, kernel))
    finally:
        model.train(was_training)
    return reports


def check_parity(
    model: PreTrainedModel,
    trees: Sequence[Tree],
    *,
    attention: Attention = "auto",
    autocast: torch.dtype | None = None,
) -> ParityReport:
    """Compare forests with the plain forward on the longest of `trees` and the first few others, in eval mode.

    `auto` tries the kernels that can run here, the fastest first, and stops at the first that is right; where none
    is, the report is the last one's. A named kernel that cannot run here or is not right raises ModelError.
    autocast: the engine's.
    """
    facts = ModelFacts.of(model, autocast=autocast)
    kernels, left_out = candidates(attention, DeviceFacts.of(model.device), facts)
    if not kernels:
        return ParityReport("plain", 0, 0, 0.0, 0.0, 0.0)
    sample = _sample(trees)
    longest = _longest(sample)
    _refuse_long_rows(model, longest)
    obstacle = no_forests(model, longest)
    if obstacle:
        failed, report = [], ParityReport(kernels[0], len(sample), longest, INFINITE, INFINITE, 0.0, reason=obstacle)
    else:
        *failed, report = _first_right(model, sample, kernels, autocast)
    if not report.passed and attention != "auto":
        raise refusal(attention, report.fault)
    reasons = dict(left_out) | {each.backend: each.fault for each in failed}
    faster = BY_SPEED[: BY_SPEED.index(kernels[len(failed)])]
    return replace(report, skipped=tuple((kernel, reasons[kernel]) for kernel in faster if kernel in reasons))


def checked_engine(
    model: PreTrainedModel,
    trees: Sequence[Tree],
    *,
    attention: Attention = "auto",
    autocast: torch.dtype | None = None,
) -> tuple[Engine, ParityReport]:
    """The engine that is right for `model`: forests where the check passes, else one branch at a time.

    Raises ModelError where the recipe names a kernel that cannot be used.
    """
    report = check_parity(model, trees, attention=attention, autocast=autocast)
    return Engine(model, report.backend if report.passed else "plain", autocast=autocast), report
