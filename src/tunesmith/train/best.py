"""The best evaluation of a stage so far, by any of its figures, and whether training has stopped to improve it.

In: a stage's settings, the loop's state, an evaluation's record. Out: the state that knows of it.
Must not know: what a figure means, updates, checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from tunesmith.errors import RecipeError
from tunesmith.recipe.best import direction_of
from tunesmith.recipe.stages import StageBase
from tunesmith.runs.records import Value
from tunesmith.train.checkpoint import State


def judged(stage: StageBase, state: State, record: Mapping[str, Value]) -> tuple[State, bool]:
    """The state after an evaluation, and whether it is the best so far.

    The best is better than all before it by anything; `patience` counts the evaluations since the last that was better
    by more than `min_improvement` than the last such one. A figure that is no number is never better.
    """
    value = _figure(record, stage.best_metric)
    sign = 1.0 if direction_of(stage) == "min" else -1.0
    is_best = math.isfinite(value) and (state.best_loss is None or sign * value < sign * state.best_loss)
    mark = state.improved_loss
    has_improved = math.isfinite(value) and (mark is None or sign * (mark - value) > stage.min_improvement)
    state = replace(
        state,
        improved_loss=value if has_improved else mark,
        num_unimproved=0 if has_improved else state.num_unimproved + 1,
    )
    return (replace(state, best_step=state.step, best_loss=value) if is_best else state), is_best


def is_over(stage: StageBase, state: State) -> bool:
    """Whether the stage ends here, before its last step: `patience` evaluations without improvement."""
    return 0 < stage.patience <= state.num_unimproved


def over_line(stage: StageBase, state: State) -> str:
    """Why a stage ended early, in words."""
    by = f" by more than {stage.min_improvement:g}" if stage.min_improvement else ""
    best = "" if state.best_loss is None else f"; the best is {state.best_loss:.6g}, at step {state.best_step}"
    which = f"{stage.best_metric} has not improved{by} in {state.num_unimproved} evaluations{best}"
    return f"the stage ends at step {state.step} of {state.num_steps}: {which}"


def refuse_missing_metric(stage: StageBase, record: Mapping[str, Value]) -> None:
    """RecipeError, before the first update, where evaluations have no figure that the recipe chooses by."""
    is_asked = stage.keep == "best" or stage.patience > 0
    if not is_asked or stage.best_metric in record:
        return
    known = ", ".join(name for name, value in record.items() if isinstance(value, float))
    raise RecipeError(
        f"the stage's evaluations have no {stage.best_metric!r}",
        where=f"stage {stage.name}, best_metric",
        remedy=f"They have: {known}.",
    )


def _figure(record: Mapping[str, Value], name: str) -> float:
    value = record.get(name)
    return float(value) if isinstance(value, int | float) else math.nan
