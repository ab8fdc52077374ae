"""The gradient of a step, whatever the memory and the precision: retried, unscaled, and refused where it is no number.

In: a session and a step's trees. Out: gradients on the weights, or none where they overflowed; their norm.
Must not know: learning rates, what follows from a step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tunesmith.engine.engine import Engine
from tunesmith.engine.retry import Budget
from tunesmith.errors import NumericsError, TunesmithError
from tunesmith.objectives import Sum
from tunesmith.train.live import with_live_reference
from tunesmith.train.noise import noisy
from tunesmith.train.nonfinite import Case, Finding, Kind, examine, lost_kind
from tunesmith.train.optim import gradient_norm
from tunesmith.train.reproducer import write_reproducer
from tunesmith.train.session import Session
from tunesmith.train.step import Batch, LostNumberError, StepResult, accumulate, name_rows
from tunesmith.train.stopping import leave_step


@dataclass(frozen=True, slots=True, eq=False)
class Gradient:
    """What a step computed. Where float16 gradients overflowed, `norm` is not finite and no gradient is left.

    left_out: a log-prob, the loss or a gradient is not finite, and the recipe says to go on without this step.
    """

    result: StepResult
    norm: float
    left_out: bool = False

    @property
    def overflowed(self) -> bool:
        """True where no update can be made."""
        return not math.isfinite(self.norm)


def step_gradient(session: Session, batch: Batch, step: int, *, num_nonfinite: int = 0) -> Gradient:
    """The step's gradient on the weights, and its norm; `num_nonfinite` steps before it were left out.

    Raises NumericsError where a log-prob, the loss, or without a loss scale a gradient, is not finite and the recipe
    does not say to leave the step out, and ResourceError where a single answer does not fit in memory. The weights
    have no gradient then.
    """
    used, scored = [session.memory.budget(step)], [batch]
    between = leave_step(session, step)
    engine = step_engine(session, step)

    def work(budget: Budget) -> StepResult:
        session.optimizer.zero_grad()  # whatever a failed try left
        used.append(budget)
        scored.append(with_live_reference(session, batch, budget, between=between))
        return accumulate(
            engine,
            scored[-1],
            objective=session.objective,
            forest_tokens=budget.forest_tokens,
            tree_tokens=budget.tree_tokens,
            machine=session.machine,
            seed_key=_seed_key(session, step),
            scaler=session.scaler,
            between=between,
        )

    def lost(kind: Kind, what: str, logprob_N: Tensor, trees: Sequence[int] = ()) -> Gradient:
        session.optimizer.zero_grad()
        case = Case(
            engine,
            scored[-1],
            session.objective,
            used[-1],
            session.machine,
            _seed_key(session, step),
            session.trainable,
        )
        finding = examine(case, kind, what, logprob_N=logprob_N, trees=trees)
        return _leave_out(session, case, finding, step, num_nonfinite)

    try:
        result = session.memory.run(work, batch.trees, step=step, phase="train")
    except LostNumberError as error:
        return lost("log-prob", error.what, error.logprob_N, error.trees)
    if step == 1 and result.num_untouched:
        session.observer.noted(f"{result.num_untouched} trained tensors got no gradient in step 1.")
    loss = result.loss.mean()
    norm = math.nan
    if math.isfinite(loss):  # else the scaler must not see this step
        session.scaler.unscale_(session.optimizer)
        norm = gradient_norm(session.trainable.values())
    kind = lost_kind(loss, 0.0 if session.scaler.is_enabled() else norm)
    if kind is not None:
        rows = name_rows([tree.id for tree in batch.trees])
        return lost(kind, f"loss {loss}, gradient norm {norm}; the step's rows: {rows}.", result.logprob_N)
    if not math.isfinite(norm):
        session.optimizer.zero_grad()
    return Gradient(result, norm)


def step_engine(session: Session, step: int) -> Engine:
    """The engine as a step trains on it: with the noise that its stage puts on the embeddings."""
    return noisy(session.engine, session.stage, key=_seed_key(session, step))


def _seed_key(session: Session, step: int) -> str:
    return f"{session.seed}/{session.stage.name}/{step}"


def _leave_out(session: Session, case: Case, finding: Finding, step: int, num_before: int) -> Gradient:
    """Write the reproducer; then no gradient where the recipe allows one more such step, else NumericsError."""
    stage = session.stage
    where = f"stage {stage.name}, step {step}"
    kept = _keep(session, case, finding, step) if session.machine.is_main else ""
    if stage.on_nonfinite == "skip" and num_before < stage.max_nonfinite:
        number = f"{num_before + 1} of at most {stage.max_nonfinite}"
        rows = finding.rows or finding.forest_rows or tuple(tree.id for tree in case.batch.trees)
        # no absolute path here: the line is the same wherever the run lies
        session.watch.left_out(step, f"no update was made, and the run goes on ({number}): {finding}", rows)
        session.observer.noted(kept)
        return Gradient(_no_result(case.batch), math.nan, left_out=True)
    limit = f"{num_before} steps were left out before it, and `max_nonfinite` allows no more. " if num_before else ""
    advice = (
        "Look at these rows; a lower learning rate or float32 may help, and `on_nonfinite: skip` leaves such steps out."
    )
    raise NumericsError(f"{finding}", where=where, remedy=f"No update was made. {limit}{advice} {kept}")


def _keep(session: Session, case: Case, finding: Finding, step: int) -> str:
    """Where the reproducer lies, in words; a disk that cannot take it is no reason to hide what was found."""
    try:
        path, has_weights = write_reproducer(
            session.folder.path, case, finding, stage=session.stage, step=step, carried=session.carried
        )
    except TunesmithError as error:
        return f"(No reproducer could be written: {error.what})"
    but = "" if has_weights else ", without the trained weights, for which the disk has no room"
    return f"The step is in {path}{but}; `python -m tunesmith.pipeline.reproduce {path}` computes it again."


def _no_result(batch: Batch) -> StepResult:
    """What the record of a step that was left out says: its size, and no number."""
    num_trained = sum(tree.num_trained for tree in batch.trees)
    lost = torch.full((num_trained,), math.nan)
    return StepResult(Sum(torch.tensor(math.nan), 1.0), {}, batch.num_tokens, lost, 0)
