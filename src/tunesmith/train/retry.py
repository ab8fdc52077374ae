"""The token budget of a stage: lowered where memory runs out, and kept, so that a resumed run takes the same.

In: a stage's budget and its folder. Out: work done within it. Must not know: objectives, optimizers.

Every lowering is a line of `budget.jsonl` with the step at which it was made. The budget of a step is the smallest of
all lines up to it, so a run that goes on from a checkpoint repeats its steps with the budgets that they had: another
budget would round their sums in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

from tunesmith.data.types import Tree
from tunesmith.engine.retry import Budget, longest_row, with_retry
from tunesmith.model.machine import Machine
from tunesmith.runs.folder import StageFolder
from tunesmith.runs.records import Record, append_record, read_records, sync_records
from tunesmith.train.identity import StageRecipe
from tunesmith.train.progress import Observer

Found = TypeVar("Found")

Phase = Literal["train", "eval"]
_ORDER = {"train": 0, "eval": 1}
"""A step trains before it is evaluated."""

FILE = "budget.jsonl"


class StageMemory:
    """What a stage knows of the memory that its forests may take."""

    def __init__(self, folder: StageFolder, stage: StageRecipe, *, machine: Machine, observer: Observer) -> None:
        """The budget that the stage asks for, and the lowerings that its folder has."""
        forest_tokens = stage.forest_tokens or machine.forest_tokens
        self._path = folder.path / FILE
        self._stage, self._machine, self._observer = stage, machine, observer
        self._asked = Budget(forest_tokens)
        # Lines of another budget than this run asks for were made for another card or another setting.
        lines = read_records(self._path)
        self._lowered = [_entry(line) for line in lines if line["asked"] == forest_tokens]

    def budget(self, step: int, phase: Phase = "train") -> Budget:
        """The budget of a step, or of the evaluation after it."""
        budget = self._asked
        for at, lowered in self._lowered:
            if at <= (step, _ORDER[phase]):
                budget = budget.smaller_of(lowered)
        return budget

    def go_on(self, step: int, forest_tokens: int | None, tree_tokens: int | None) -> None:
        """Take the budget of a checkpoint, in case the folder's lines no longer tell it."""
        if forest_tokens is not None:
            self._lowered.append(((step, _ORDER["eval"]), Budget(forest_tokens, tree_tokens)))

    def run(self, work: Callable[[Budget], Found], trees: Sequence[Tree], *, step: int, phase: Phase) -> Found:
        """What `work` returns, done again in smaller forests as long as memory runs out; see `with_retry`.

        Raises ResourceError where a single answer does not fit.
        """

        def lowered(budget: Budget, problem: str) -> None:
            self._lowered.append(((step, _ORDER[phase]), budget))
            name, tokens = longest_row(trees)
            what = "step" if phase == "train" else "evaluation after step"
            self._observer.noted(
                f"memory ran out in {what} {step} ({problem}); it is done again, and the stage goes on, in "
                f"{budget.described()}; the longest row there is {name} with {tokens} tokens"
            )
            if self._machine.is_main:
                append_record(self._path, self._line(budget, step, phase))
                sync_records(self._path)

        return with_retry(
            work,
            trees,
            budget=self.budget(step, phase),
            device=self._machine.device,
            where=f"stage {self._stage.name}, step {step}",
            lowered=lowered,
            can_recompute=phase == "train" and self._stage.gradient_checkpointing != "full",
        )

    def _line(self, budget: Budget, step: int, phase: Phase) -> Record:
        return {
            "step": step,
            "phase": phase,
            "asked": self._asked.forest_tokens,
            "forest_tokens": budget.forest_tokens,
            "tree_tokens": budget.tree_tokens,
        }


def _entry(line: Record) -> tuple[tuple[int, int], Budget]:
    step, phase, forest_tokens, tree_tokens = (line[key] for key in ("step", "phase", "forest_tokens", "tree_tokens"))
    assert isinstance(step, int)
    assert isinstance(phase, str)
    assert isinstance(forest_tokens, int)
    assert isinstance(tree_tokens, int | None)
    return (step, _ORDER[phase]), Budget(forest_tokens, tree_tokens)
