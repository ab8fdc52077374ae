"""What a method carries from step to step: put into its function before a step, moved on after an update.

In: a session and the loop's state. Out: the session as it is for a step; the state after it.
Must not know: which methods there are, files.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from tunesmith.errors import NumericsError
from tunesmith.objectives import Carried, Result
from tunesmith.train.checkpoint import State
from tunesmith.train.gradient import Gradient
from tunesmith.train.session import Session


def bound(session: Session, state: State) -> Session:
    """The session whose objective has what the method carries at this state."""
    if session.objective.carrying is None:
        return session
    carried = Carried(state.carried, state.tensors)
    return replace(session, objective=session.objective.bound(carried), carried=carried)


def advanced(session: Session, state: State, found: Gradient) -> State:
    """The state after an update; where the step made none, the method has seen nothing.

    Raises NumericsError where a number that is carried is not finite.
    """
    if session.objective.carrying is None or found.overflowed or found.left_out:
        return state
    before = Carried(state.carried, state.tensors)
    with torch.no_grad():
        result = Result(found.result.loss, found.result.metrics)
        after = session.objective.advance(before, result, session.trainable)
    assert after.numbers.keys() == before.numbers.keys(), "a method carries the same names from step to step"
    assert after.tensors.keys() == before.tensors.keys(), "a method carries the same names from step to step"
    bad = [name for name, number in after.numbers.items() if not math.isfinite(number)]
    if bad:
        where = f"stage {session.stage.name}, step {state.step}"
        raise NumericsError(f"what the method carries as {bad[0]} is {after.numbers[bad[0]]}.", where=where)
    return replace(state, carried=dict(after.numbers), tensors=dict(after.tensors))
