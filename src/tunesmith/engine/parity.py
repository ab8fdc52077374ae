"""The parity check: is the forest forward right for this model, on these rows?

In: a model and a few real trees, the longest among them. Out: a report, and the engine to use.
Must not know: files, recipes, objectives.

Two questions, because in low precision a tolerance alone can hide a leak: do log-probs equal the plain forward's,
one branch at a time, and does changing one tree (or one branch) leave all others as they were?
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
from tunesmith.engine.engine import Backend, Engine
from tunesmith.engine.plain import plain_logprobs
from tunesmith.errors import ModelError, ResourceError

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest difference in a token's log-prob over the largest log-prob: some hundred roundings of the type."""
LEAK_TOLERANCE = 1e-6
"""Untouched trees run the same kernels on the same numbers: they may differ by reordered sums only."""
NUM_TREES = 4


@dataclass(frozen=True, slots=True)
class ParityReport:
    """What the check found. Errors are relative to the largest log-prob of the trees."""

    backend: Backend
    num_trees: int
    longest_tokens: int
    error: float
    leak: float
    tolerance: float
    reason: str = ""

    @property
    def passed(self) -> bool:
        """True where the forest forward may be used."""
        return not self.reason and self.error <= self.tolerance and self.leak <= LEAK_TOLERANCE

    def line(self) -> str:
        """One line for the first lines of a run."""
        if self.reason:
            return f"parity: forests fail on this model ({self.reason}); every answer runs in a row of its own"
        what = f"{self.num_trees} trees, longest {self.longest_tokens} tokens"
        figures = f"log-probs within {self.error:.1e} (limit {self.tolerance:.0e}), leak {self.leak:.0e}"
        verdict = "passed" if self.passed else "FAILED: every answer runs in a row of its own"
        return f"parity: {verdict}, backend sdpa, {what}, {figures}"


def _sample(trees: Sequence[Tree]) -> list[Tree]:
    """The longest tree (by its longest row) and the first few others; identical positions are taken once."""
    sizes = sizes_of(trees)
    usable = np.flatnonzero(sizes.num_trained > 1)
    if not len(usable):
        raise ModelError("no row has a trained token, so there is nothing to check or train")
    longest = int(usable[np.argmax(sizes.longest_row[usable])])
    others = [number for number in usable[:NUM_TREES].tolist() if number != longest]
    return [trees[number] for number in (*others[: NUM_TREES - 1], longest)]


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
    worst = 0.0
    first = len(trees[0].branches)
    changed = [_perturb(trees[0], vocabulary, branch_only=False), *trees[1:]]
    moved_N = (engine.logprobs(changed).logprob_N - before_N).abs()
    untouched_N = branch_N >= first
    if bool(untouched_N.any()):
        worst = float(moved_N[untouched_N].max())
    changed = [*trees[:-1], _perturb(trees[-1], vocabulary, branch_only=True)]
    moved_N = (engine.logprobs(changed).logprob_N - before_N).abs()
    untouched_N = branch_N != sum(len(tree.branches) for tree in trees[:-1])
    if bool(untouched_N.any()):
        worst = max(worst, float(moved_N[untouched_N].max()))
    return worst


def _refuse_full_memory(problem: Exception, longest: int) -> None:
    """A check that did not fit says nothing about the model, and the slower path would need more memory yet."""
    if isinstance(problem, torch.OutOfMemoryError) or "allocate memory" in str(problem):
        raise ResourceError(
            "memory ran out in the parity check, which runs the longest row through the model",
            where=f"a row of {longest} tokens",
            remedy="Lower the stage's `max_length`, or use a smaller model or `quantization: nf4`.",
        ) from problem


@torch.no_grad()
def check_parity(model: PreTrainedModel, trees: Sequence[Tree]) -> ParityReport:
    """Compare forests with the plain forward on the longest of `trees` and the first few others, in eval mode."""
    sample = _sample(trees)
    longest = max(len(tree.prompt_ids) + max(len(branch.ids) for branch in tree.branches) for tree in sample)
    tolerance = TOLERANCE.get(model.dtype, TOLERANCE[torch.float32])
    report = ParityReport("sdpa", len(sample), longest, float("inf"), float("inf"), tolerance)
    engine = Engine(model)
    was_training = model.training
    model.eval()
    try:
        plain_N = plain_logprobs(model, sample).logprob_N
        with ordinary_attention(model):  # so that the model's own attention is back, whatever happens
            packed = engine.logprobs(sample)
            scale = float(plain_N.abs().max())
            error = float((packed.logprob_N - plain_N).abs().max()) / scale
            leak = _leak(engine, sample, packed.logprob_N, packed.branch_N) / scale
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, NotImplementedError) as problem:
        _refuse_full_memory(problem, longest)
        return replace(report, reason=f"{type(problem).__name__}: {str(problem).splitlines()[0][:120]}")
    finally:
        model.train(was_training)
    return replace(report, error=error, leak=leak)


def checked_engine(model: PreTrainedModel, trees: Sequence[Tree]) -> tuple[Engine, ParityReport]:
    """The engine that is right for `model`: forests where the check passes, else one branch at a time."""
    report = check_parity(model, trees)
    return Engine(model, "sdpa" if report.passed else "plain"), report
