"""Log-probs of many trees, forest by forest, in a pass that may be broken off and gone on with.

In: an engine, trees, a token budget, what of the pass is on disk. Out: one float32 array a tree.
Must not know: objectives, caches of whole passes.

The forests are planned once, from all trees, and scored in their order; where memory runs out, what is left is
planned again under a smaller budget, and the parts on disk say where. So a pass that was broken off computes the
forests that an unbroken one would, and ends in the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

import numpy as np
import torch

from tunesmith.data.plan import plan_forests
from tunesmith.data.store import Chosen
from tunesmith.data.types import Tree
from tunesmith.engine.engine import Engine
from tunesmith.engine.reference_parts import FloatArray, Part, Parts, Phase
from tunesmith.engine.retry import Budget, with_retry
from tunesmith.errors import NumericsError

Key = tuple[int, int | None]
"""A tree's number, and one branch of it behind the prompt, or None for all."""
NUM_RECHECKED = 16
RECHECK_TOLERANCE = 1e-5
"""Relative difference allowed between a stored and a recomputed log-prob in float32; in 16 bits, LOW_TOLERANCE."""
LOW_TOLERANCE = 5e-2


@dataclass(slots=True, eq=False)
class Pass:
    """The forests of a pass in their order, and the log-probs of those that are scored, by place."""

    trees: Sequence[Tree]
    phases: list[Phase]
    forests: list[list[Key]] = field(default_factory=list)
    done: dict[int, list[FloatArray]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.forests = planned(self.trees, self.phases)

    def tree(self, key: Key) -> Tree:
        """The tree of a unit: whole, or with one branch."""
        number, branch = key
        tree = self.trees[number]
        return tree if branch is None else replace(tree, branches=(tree.branches[branch],))

    def lower(self, budget: Budget) -> None:
        """Plan what is behind the first forest that is not scored again, under this budget."""
        place = next(number for number in range(len(self.forests)) if number not in self.done)
        closed, left = [], place
        for phase in self.phases:
            count = left if phase.num_forests is None else min(left, phase.num_forests)
            left -= count
            closed += [Phase(phase.budget, count)] if count else []
        self.phases = [*closed, Phase(budget)]
        self.forests = planned(self.trees, self.phases)
        self.done = {number: values for number, values in self.done.items() if number < place}

    def adopt(self, parts: Sequence[Part]) -> None:
        """Take what an earlier pass over the same trees left: its phases, and every forest that fits them."""
        if not parts:
            return
        self.phases = list(max(parts, key=lambda part: len(part.phases)).phases)
        self.forests = planned(self.trees, self.phases)
        for part in parts:
            end = self._agreed(part.phases)
            units = iter(np.split(part.values, np.cumsum(part.lengths)[:-1]) if len(part.lengths) else [])
            for place in part.places.tolist():
                if not 0 <= place < end:  # places rise: behind it the plan has become another
                    break
                values = list(islice(units, len(self.forests[place])))
                if len(values) == len(self.forests[place]):
                    self.done[place] = values

    def scores(self) -> list[FloatArray]:
        """One array a tree, of a pass that is done; a slot that nothing filled is NaN."""
        found = {
            key: values
            for place, forest in enumerate(self.forests)
            for key, values in zip(forest, self.done[place], strict=True)
        }
        return [self._joined(found, number) for number in range(len(self.trees))]

    def num_trees(self, places: Iterable[int]) -> int:
        """Trees in these forests, each counted at its first branch."""
        return sum(branch in (None, 0) for place in places for _, branch in self.forests[place])

    def _joined(self, found: dict[Key, FloatArray], number: int) -> FloatArray:
        whole = found.get((number, None))
        if whole is not None:
            return whole
        unfilled = np.full(1, np.nan, np.float32)
        branches = range(len(self.trees[number].branches))
        return np.concatenate([found.get((number, branch), unfilled) for branch in branches])

    def _agreed(self, phases: Sequence[Phase]) -> int:
        """Forests at the plan's start that are the same under these phases, of an earlier state of the pass."""
        num_before = 0
        for mine, other in zip(self.phases, phases, strict=False):
            if mine.budget != other.budget:
                break
            counts = [phase.num_forests for phase in (mine, other) if phase.num_forests is not None]
            num_before = min((num_before + number for number in counts), default=len(self.forests))
            if mine != other:
                break
        return num_before


def planned(trees: Sequence[Tree], phases: Sequence[Phase]) -> list[list[Key]]:
    """The forests of a pass: of every phase as many as were scored in it, each planned from what was left then."""
    forests: list[list[Key]] = []
    left = np.arange(len(trees))
    for phase in phases:
        plan = _plan(Chosen(trees, left.tolist()), phase.budget)
        forests += [[(int(left[number]), branch) for number, branch in forest] for forest in plan[: phase.num_forests]]
        if phase.num_forests is not None:
            keys = {key for forest in forests for key in forest}
            left = np.array([number for number in left.tolist() if not _is_scored(keys, trees, number)], np.int64)
    return forests


def _plan(trees: Sequence[Tree], budget: Budget) -> list[list[Key]]:
    if budget.tree_tokens is None:  # the usual case, in which no tree is read from disk for it
        return [[(number, None) for number in forest] for forest in plan_forests(trees, budget.forest_tokens)]
    return [[(unit.index, unit.branch) for unit in units] for units in budget.plan(trees)]


def _is_scored(keys: set[Key], trees: Sequence[Tree], number: int) -> bool:
    if (number, None) in keys or (number, 0) not in keys:
        return (number, None) in keys
    return all((number, branch) in keys for branch in range(len(trees[number].branches)))


@torch.no_grad()
def score(
    engine: Engine,
    trees: Sequence[Tree],
    *,
    forest_tokens: int,
    progress: Callable[[int], None] | None = None,
    tell: Callable[[str], None] = lambda text: None,
    between: Callable[[], None] = lambda: None,
    parts: Parts | None = None,
) -> list[FloatArray]:
    """Log-probs of the trained tokens of every tree, in branch and token order, in eval mode.

    Where memory runs out it goes on in smaller forests from where it was, and tells. `between` is called before each
    forest and may raise; with `parts` what is scored then is on disk, and the next pass takes it. Raises
    NumericsError for log-probs that are not finite, ResourceError where an answer alone does not fit.
    """
    state = Pass(trees, [Phase(Budget(forest_tokens))])
    count = progress or (lambda num_trees: None)

    def work(budget: Budget) -> None:
        for place in range(len(state.forests)):
            if place in state.done:
                continue
            between()
            state.done[place] = _values(engine, [state.tree(key) for key in state.forests[place]])
            count(state.num_trees([place]))
            if parts is not None:
                parts.add(place, state.done[place], state.phases)

    def lowered(budget: Budget, problem: str) -> None:
        tell(f"memory ran out ({problem}); going on in {budget.described()}")
        state.lower(budget)

    was_training = engine.model.training
    engine.model.eval()
    try:
        if parts is not None:
            _go_on(engine, state, parts, tell)
            count(state.num_trees(state.done))
        device, budget = engine.model.device, state.phases[-1].budget
        with_retry(work, trees, budget=budget, device=device, where="log-probs of the reference", lowered=lowered)
    except BaseException:
        if parts is not None:
            parts.publish(state.phases)
        raise
    finally:
        engine.model.train(was_training)
    scores = state.scores()
    bad = [number for number, values in enumerate(scores) if not np.isfinite(values).all()]
    if bad:
        if parts is not None:
            parts.remove()
        raise NumericsError(
            f"the reference's log-probs are not finite on {len(bad)} rows",
            where=", ".join(trees[number].id for number in bad[:5]),
            remedy="check the model's weights and its dtype; float16 overflows on models trained in bfloat16",
        )
    return scores


def agree(engine: Engine, trees: Sequence[Tree], scores: Sequence[FloatArray], *, forest_tokens: int) -> bool:
    """Whether up to 16 of `scores`, which were read from disk, are what the engine computes now."""
    picked = np.random.default_rng(len(trees)).permutation(len(trees))[:NUM_RECHECKED].tolist()
    fresh = score(engine, [trees[number] for number in picked], forest_tokens=forest_tokens)
    limit = RECHECK_TOLERANCE if engine.dtype == torch.float32 else LOW_TOLERANCE
    return all(_is_near(values, scores[number], limit) for number, values in zip(picked, fresh, strict=True))


def _is_near(fresh: FloatArray, stored: FloatArray, limit: float) -> bool:
    if fresh.shape != stored.shape or not len(fresh):
        return fresh.shape == stored.shape
    return float(np.abs(fresh - stored).max()) <= limit * max(1.0, float(np.abs(fresh).max()))


def _go_on(engine: Engine, state: Pass, parts: Parts, tell: Callable[[str], None]) -> None:
    """Take over what an earlier pass left, if a sample of it is what the engine computes now."""
    begin = state.phases
    state.adopt(parts.read())
    if not state.done:
        return
    units = [(place, number) for place in state.done for number in range(len(state.done[place]))]
    picked = [units[number] for number in np.random.default_rng(len(units)).permutation(len(units))[:NUM_RECHECKED]]
    trees = [state.tree(state.forests[place][number]) for place, number in picked]
    scores = [state.done[place][number] for place, number in picked]
    if agree(engine, trees, scores, forest_tokens=state.phases[-1].budget.forest_tokens):
        tell(f"reference: going on behind {state.num_trees(state.done):,} of {len(state.trees):,} rows scored before")
        return
    tell("reference: what an earlier pass left does not agree with a recomputed sample; all rows are scored again")
    parts.remove()
    state.phases, state.done = begin, {}
    state.forests = planned(state.trees, state.phases)


def _values(engine: Engine, trees: Sequence[Tree]) -> list[FloatArray]:
    """Log-probs of each tree of one forest."""
    logprobs = engine.logprobs(trees)
    tree_N = logprobs.tree_B[logprobs.branch_N].cpu().numpy()
    values_N = logprobs.logprob_N.float().cpu().numpy()
    return [part.copy() for part in np.split(values_N, np.searchsorted(tree_N, np.arange(1, len(trees))))]
