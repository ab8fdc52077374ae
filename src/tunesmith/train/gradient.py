"""The gradient of a step, whatever the memory and the precision: retried, unscaled, and refused where it is no number.

In: a session and a step's trees. Out: gradients on the weights, or none where they overflowed; their norm.
Must not know: files, learning rates, what follows from a step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tunesmith.engine.retry import Budget
from tunesmith.errors import NumericsError
from tunesmith.train.optim import gradient_norm
from tunesmith.train.session import Session
from tunesmith.train.step import Batch, StepResult, accumulate, name_rows


@dataclass(frozen=True, slots=True, eq=False)
class Gradient:
    """What a step computed. Where float16 gradients overflowed, `norm` is not finite and no gradient is left."""

    result: StepResult
    norm: float

    @property
    def overflowed(self) -> bool:
        """True where no update can be made."""
        return not math.isfinite(self.norm)


def step_gradient(session: Session, batch: Batch, step: int) -> Gradient:
    """The step's gradient on the weights, and its norm.

    Raises NumericsError where a loss, or without a loss scale a gradient, is not finite, and ResourceError where a
    single answer does not fit in memory. The weights have no gradient then.
    """
    where = f"stage {session.stage.name}, step {step}"
    remedy = "No update was made. Look at these rows; a lower learning rate or float32 may help."

    def work(budget: Budget) -> StepResult:
        session.optimizer.zero_grad()  # whatever a failed try left
        return accumulate(
            session.engine,
            batch,
            objective=session.objective,
            forest_tokens=budget.forest_tokens,
            tree_tokens=budget.tree_tokens,
            machine=session.machine,
            seed_key=f"{session.seed}/{session.stage.name}/{step}",
            scaler=session.scaler,
        )

    try:
        result = session.memory.run(work, batch.trees, step=step, phase="train")
    except NumericsError as error:
        session.optimizer.zero_grad()
        raise NumericsError(error.what, where=where, remedy=remedy) from error
    if step == 1 and result.num_untouched:
        session.observer.noted(f"{result.num_untouched} trained tensors got no gradient in step 1.")
    session.scaler.unscale_(session.optimizer)
    found = Gradient(result, gradient_norm(session.trainable.values()))
    is_bad = not math.isfinite(result.loss.mean()) or (found.overflowed and not session.scaler.is_enabled())
    if is_bad or found.overflowed:
        session.optimizer.zero_grad()
    if is_bad:
        rows = name_rows([tree.id for tree in batch.trees])
        what = f"loss {result.loss.mean()}, gradient norm {found.norm}; the step's rows: {rows}."
        raise NumericsError(what, where=where, remedy=remedy)
    return found
