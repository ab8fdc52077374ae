"""A stage that is asked to stop: what is still finished, and what is left to the next start.

In: a session, whose `stop` knows whether and until when. Out: functions that the loop, a step and an evaluation call.
Must not know: how a state is saved.

A step is finished where its end and the save fit before the deadline. Else it is left between two of its forests: no
weight has moved yet, so the state before it is saved, and the next start does it again, from the same random draws. An
evaluation is left at once, for the next start can make it as well: nothing changes between a save and the evaluation
that belongs to it.
"""

from __future__ import annotations

from collections.abc import Callable

from tunesmith.errors import StoppedError
from tunesmith.runs.records import read_records
from tunesmith.runs.stop import GOES_ON
from tunesmith.train.session import Session

_SLOW_DISK_BYTES = 2e8
"""Bytes that a slow disk takes in a second."""


class LeftError(StoppedError):
    """A step or an evaluation was left in the middle, where nothing had changed yet."""


def expect_save(session: Session) -> None:
    """Until a save was measured it is thought to write weights and two moments at what a slow disk takes."""
    num_bytes = sum(3 * weight.numel() * weight.element_size() for weight in session.trainable.values())
    session.stop.expect("save", 0.5 + num_bytes / _SLOW_DISK_BYTES)


def stop_number(session: Session, *, evaluates_next: bool) -> int:
    """Signal to exit by after this step's save, the same on every rank; 0 to go on.

    A time limit leaves room for the next step, its evaluation and its save.
    """
    kinds = ("step", "save", "evaluation") if evaluates_next else ("step", "save")
    return session.machine.largest(session.stop.number if session.stop.is_due(*kinds) else 0)


def stopped(session: Session, step: int, number: int) -> StoppedError:
    """What the run ends with once `step` is saved."""
    return StoppedError(
        f"stopped by {session.stop.reason} after step {step} of {session.num_steps}; it is saved.",
        signal_number=number,
        where=f"stage {session.stage.name}",
        remedy=GOES_ON,
    )


def leave_step(session: Session, step: int) -> Callable[[], None]:
    """Called between the forests of a step: raises LeftError where its end and a save no longer fit.

    Only where there is one process: several would have to agree before each forest.
    """
    stop = session.stop
    begun = stop.begin("step")

    def look() -> None:
        if session.machine.world_size == 1 and stop.number and not stop.fits(begun, "save"):
            raise _left(session, f"in step {step}, which would not have been done in time", step - 1)

    return look


def leave_evaluation(session: Session, step: int) -> Callable[[], None]:
    """Called between the forests of an evaluation: raises LeftError as soon as a stop is asked for."""

    def look() -> None:
        if session.machine.world_size == 1 and session.stop.number:
            raise _left(session, f"in the evaluation after step {step}", step)

    return look


def is_evaluated(session: Session, step: int) -> bool:
    """Whether the evaluation after `step` has its record: a stop may have come between the save and it."""
    return any(record["step"] == step for record in read_records(session.folder.eval_path))


def _left(session: Session, where: str, saved_step: int) -> LeftError:
    kept = f"step {saved_step} is saved" if saved_step else "the stage has taken no step yet"
    return LeftError(
        f"stopped by {session.stop.reason} {where}; {kept}.",
        signal_number=session.stop.number,
        where=f"stage {session.stage.name}",
        remedy=GOES_ON,
    )
