"""Rows that changed in the middle of a stage, where a person has accepted it: from which step they are trained.

In: a stage's session, its fresh state, its checkpoints. Out: the step and epoch at which the present rows begin, and
the state that a checkpoint of the former rows must agree with. Must not know: ledgers, manifests, why rows changed.

The epoch that was under way begins again with the new rows; its finished part stays in the weights. Where the present
rows begin is part of a stage's identity, so that every checkpoint after the change says it and goes on from it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace

from tunesmith.data.plan import num_steps
from tunesmith.errors import ResumeError
from tunesmith.train.checkpoint import STATE, State, find_problem, list_steps, path_of
from tunesmith.train.session import RowsStart, Session

FROM = "rows.from"
_SIDES = ("rows.train", "rows.heldout", "rows.replay")


@dataclass(frozen=True, slots=True, eq=False)
class GoingOn:
    """A stage whose rows may have changed. `expected` is what its newest checkpoint must agree with, `fresh` what the
    checkpoints to come say; they differ in the rows alone."""

    session: Session
    fresh: State
    expected: State

    def taken(self, resumed: State) -> State:
        """The state to go on with: a best loss on other held-out rows is not comparable, so it is let go."""
        if self.expected is self.fresh:
            return resumed
        state = replace(resumed, identity=self.fresh.identity, reference_mean=self.fresh.reference_mean)
        if self.expected.identity["rows.heldout"] != self.fresh.identity["rows.heldout"]:
            state = replace(state, best_step=None, best_loss=None)
        return state


def go_on_with_rows(session: Session, fresh: State, *, tell: Callable[[str], None]) -> GoingOn:
    """Where the present rows begin: as the newest whole checkpoint says, or, where it is of other rows, behind it."""
    saved = _newest(session)
    if saved is None:
        return GoingOn(session, fresh, fresh)
    then = saved.identity
    start = _start_of(saved)
    former = {name: then.get(name) for name in _SIDES}
    if former != {name: fresh.identity[name] for name in _SIDES}:
        steps_per_epoch = num_steps(_count(saved), session.stage.batch_size, 1)
        start = RowsStart(saved.step, start.epoch + (saved.step - start.step) // steps_per_epoch)
        tell(
            f"The rows have changed: the new ones are trained from step {start.step + 1} on, "
            f"from the start of epoch {start.epoch + 1}."
        )
    session = replace(session, rows_start=start)
    identity = {**fresh.identity, **({FROM: [start.step, start.epoch]} if start.step else {})}
    fresh = replace(fresh, num_steps=session.num_steps, identity=identity)
    before = {name: value for name, value in identity.items() if name != FROM} | former
    if FROM in then:
        before[FROM] = then[FROM]
    return GoingOn(session, fresh, replace(fresh, identity=before, reference_mean=_reference(saved, fresh, former)))


def _reference(saved: State, fresh: State, former: dict[str, object]) -> float | None:
    """The mean log-prob of the reference is of the rows: of others it says nothing."""
    same = all(fresh.identity[name] == value for name, value in former.items())
    comparable = not same and (saved.reference_mean is None) == (fresh.reference_mean is None)
    return saved.reference_mean if comparable else fresh.reference_mean


def _newest(session: Session) -> State | None:
    """The state of the newest whole checkpoint: the one that a resume takes."""
    folder = session.folder.checkpoints
    for step in reversed(list_steps(folder)):
        path = path_of(folder, step)
        if not find_problem(path):
            return State(**json.loads((path / STATE).read_text("utf-8")))
    return None


def _start_of(saved: State) -> RowsStart:
    value = saved.identity.get(FROM, [0, 0])
    if isinstance(value, list) and len(value) == 2 and all(isinstance(number, int) for number in value):
        return RowsStart(*value)
    raise ResumeError(f"the checkpoint of step {saved.step} does not say where its rows begin: {value!r}")


def _count(saved: State) -> int:
    """Training rows that the checkpoint was made with: its identity says `11, sha256 ...`."""
    count = str(saved.identity.get("rows.train", "")).partition(",")[0]
    if not count.isdigit() or int(count) == 0:
        raise ResumeError(f"the checkpoint of step {saved.step} does not say how many rows it was trained on")
    return int(count)
