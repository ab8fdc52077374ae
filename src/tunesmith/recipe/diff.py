"""What changed between the recipe of a run and the recipe given now, and what may change in mid-run.

In: two recipes. Out: one `Change` for each field that differs.
Must not know: run folders; what is done with an unsafe change is decided where they are.

A change is safe when the steps that were already taken would have been the same with it:

- place: `runs_folder`;
- cadence: `data_workers`, `save_before`, `stop_within`, `save_every`, `keep_checkpoints`, `on_nonfinite`,
  `max_nonfinite` (a stage that went on past such a step has counted it), and `eval_every` and `samples` while the
  last step is kept (with `keep: best` the evaluations choose the result), `on_diagnosis` and `kl_budget` (unless they
  roll back);
- comparison: everything under `compare`, which reads finished stages;
- rounding: `threads`, `memory`, `forest_tokens`, `gradient_checkpointing`, `offload_activations`, and the model's
  `attention`, `kernels` and `compile`. They exist to get past a full memory or to save time, and change sums in their
  last bits only. A run resumed so is equal to an uninterrupted one to rounding, no longer bitwise;
- more steps: a raised `epochs` or `max_steps` of the last stage whose learning rate is constant and without
  warm-up. Every other schedule spans all steps, so that more of them change the first ones; and a later stage
  has started from this one's end.

Everything else would make one run out of two, and is not safe.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from tunesmith.recipe.explain import write_value
from tunesmith.recipe.fields import leaves
from tunesmith.recipe.models import Recipe, Stage
from tunesmith.recipe.yaml12 import KeyPath, Value, format_path

Kind = Literal["place", "cadence", "comparison", "rounding", "more steps", "unsafe"]
MISSING = "(absent)"  # stands for a field that one of the two recipes does not have

_STAGE_PATH = re.compile(r"stages\[([0-9]+)\]")

_TOP: dict[str, Kind] = {
    "runs_folder": "place",
    "compare": "comparison",
    "threads": "rounding",
    "memory": "rounding",
    "data_workers": "cadence",
    "save_before": "cadence",
    "stop_within": "cadence",
}
_STAGE: dict[str, Kind] = {
    "save_every": "cadence",
    "keep_checkpoints": "cadence",
    "on_nonfinite": "cadence",
    "max_nonfinite": "cadence",
    "forest_tokens": "rounding",
    "gradient_checkpointing": "rounding",
    "offload_activations": "rounding",
}
WHY: dict[Kind, str] = {
    "place": "it says where files lie, not what is in them",
    "cadence": "it says when something is saved, measured or stopped, not what is trained",
    "comparison": "it is read when the stages are finished",
    "rounding": "it changes sums in their last bits only, so the run is equal to an unbroken one to rounding",
    "more steps": "the learning rate is constant, so the steps that were taken stay as they are",
    "unsafe": "the steps that were taken would have been others with it",
}
"""Why a change of each kind may be made in mid-run, or may not."""
_MODEL: dict[str, Kind] = {"attention": "rounding", "kernels": "rounding", "compile": "rounding"}


@dataclass(frozen=True, slots=True)
class Change:
    """One field, before and after. `kind` is `unsafe`, or the reason why the change is safe."""

    path: str
    old: Value
    new: Value
    kind: Kind

    @property
    def safe(self) -> bool:
        """Whether a run may go on with it."""
        return self.kind != "unsafe"

    @property
    def why(self) -> str:
        """Why a run may go on with it, or may not, in one line."""
        return WHY[self.kind]

    @property
    def stage_number(self) -> int | None:
        """Place of the stage that it is in; None for a change above the stages."""
        found = _STAGE_PATH.match(self.path)
        return int(found.group(1)) if found else None

    def __str__(self) -> str:
        return f"{self.path}: {_shown(self.old)} -> {_shown(self.new)}"


def _shown(value: Value) -> str:
    return MISSING if value == MISSING else write_value(value)


def diff_recipes(old: Recipe, new: Recipe) -> list[Change]:
    """Every field that differs, in the order of the models; stages are matched by their place in the list."""
    before = {leaf.path: leaf.value for leaf in leaves(old)}
    after = {leaf.path: leaf.value for leaf in leaves(new)}
    changes = []
    for path in dict.fromkeys([*before, *after]):
        was, now = before.get(path, MISSING), after.get(path, MISSING)
        if was != now:
            changes.append(Change(format_path(path), was, now, _kind(path, old, new)))
    return changes


def _kind(path: KeyPath, old: Recipe, new: Recipe) -> Kind:
    if path[0] == "model":
        return _MODEL.get(str(path[1]), "unsafe")
    if path[0] != "stages":
        return _TOP.get(str(path[0]), "unsafe")
    number = path[1] if len(path) > 1 else None
    if len(path) > 3 and path[2] == "samples":
        path = path[:3]
    if not isinstance(number, int) or len(path) != 3 or len(old.stages) != len(new.stages):
        return "unsafe"
    name = str(path[2])
    was, now = old.stages[number], new.stages[number]
    rolls_back = "rollback" in (was.on_diagnosis, now.on_diagnosis)
    if name in ("on_diagnosis", "kl_budget") and not rolls_back:
        return "cadence"
    if name in ("eval_every", "samples") and was.keep == now.keep == "final" and not rolls_back:
        return "cadence"
    if name in ("epochs", "max_steps"):
        return _more_steps(was, now, last=number == len(new.stages) - 1)
    return _STAGE.get(name, "unsafe")


def _more_steps(was: Stage, now: Stage, *, last: bool) -> Kind:
    steady = all(stage.schedule == "constant" and stage.warmup_fraction == 0 for stage in (was, now))
    raised = now.epochs >= was.epochs and _limit(now) >= _limit(was)
    return "more steps" if steady and raised and last else "unsafe"


def _limit(stage: Stage) -> float:
    return float("inf") if stage.max_steps is None else stage.max_steps
