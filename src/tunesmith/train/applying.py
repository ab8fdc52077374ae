"""What follows from a step's gradient: an update, or none, and what the state and the record say of it.

In: a session, the loop's state, a gradient. Out: the state after the step; the record's keys about skipping.
Must not know: files, how a gradient is computed.

The schedule counts updates: a step without one, whatever the reason, does not advance it.
"""

from __future__ import annotations

from dataclasses import replace

from tunesmith.runs.records import Record
from tunesmith.train.checkpoint import State
from tunesmith.train.gradient import Gradient
from tunesmith.train.optim import update
from tunesmith.train.session import Session


def apply_gradient(session: Session, state: State, found: Gradient, learning_rate: float) -> tuple[State, Record]:
    """Update the weights, or skip the step where its gradients overflowed or a number was lost."""
    scale = session.scaler.get_scale()
    scaled: Record = {"loss_scale": scale} if session.scaler.is_enabled() else {}
    if found.left_out:  # the loss scale has not seen this step: a lower one would not have helped
        left = replace(state, num_skipped=state.num_skipped + 1, num_nonfinite=state.num_nonfinite + 1)
        return left, {**scaled, "skipped": True, "nonfinite": True}
    if not found.overflowed:
        update(
            session.optimizer,
            session.trainable,
            learning_rate=learning_rate,
            norm=found.norm,
            max_norm=session.stage.max_grad_norm,
        )
    session.scaler.update()
    if not session.scaler.is_enabled():
        return state, {}
    if not found.overflowed:
        return replace(state, skips_in_row=0), {**scaled, "skipped": False}
    session.observer.noted(
        f"step {state.step}: gradients overflowed at a loss scale of {scale:g}, so no update was made; "
        f"the scale is {session.scaler.get_scale():g} now"
    )
    skipped = replace(state, num_skipped=state.num_skipped + 1, skips_in_row=state.skips_in_row + 1)
    return skipped, {**scaled, "skipped": True}
