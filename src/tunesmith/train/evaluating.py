"""Evaluations of a stage while it trains: when they are due, what they record, which step is the best.

In: a session and the loop's state. Out: a line of eval.jsonl; the state that knows the best step.
Must not know: how a figure is computed, updates, checkpoints.
"""

from __future__ import annotations

import time

from tunesmith.engine.retry import Budget
from tunesmith.runs.records import Record
from tunesmith.train.best import is_over, judged, over_line, refuse_missing_metric
from tunesmith.train.checkpoint import State
from tunesmith.train.evaluate import evaluate
from tunesmith.train.live import with_live_reference
from tunesmith.train.samples import probed
from tunesmith.train.session import Session
from tunesmith.train.stopping import leave_evaluation


def evaluate_if_due(session: Session, state: State) -> tuple[State, bool]:
    """The state after an evaluation, and whether this step is the best so far; step 0 is no result, so no best."""
    if not is_due(session, state.step, session.stage.eval_every):
        return state, False
    record = evaluate_now(session, state)
    if record is None:
        return state, False
    state, is_best = judged(session.stage, state, record)
    if is_over(session.stage, state) and state.step < session.num_steps:
        session.observer.noted(over_line(session.stage, state))
    return state, is_best


def evaluate_now(session: Session, state: State) -> Record | None:
    """Evaluate and record; the record, or None where nothing is held out."""
    if not session.heldout.trees:
        return None

    def work(budget: Budget) -> Record:
        between = leave_evaluation(session, state.step)
        return evaluate(
            session.engine,
            with_live_reference(session, session.heldout, budget, between=between),
            objective=session.objective,
            forest_tokens=budget.forest_tokens,
            tree_tokens=budget.tree_tokens,
            machine=session.machine,
            between=between,
        )

    start = time.monotonic()
    figures = session.memory.run(work, session.heldout.trees, step=state.step, phase="eval")
    record: Record = {"step": state.step, **figures, **probed(session, state.step)}
    session.stop.took("evaluation", time.monotonic() - start)
    if session.machine.is_main:
        session.records.append(session.folder.eval_path, record)
    session.observer.evaluated(record)
    session.watch.evaluated(record)
    if state.step == 0:
        refuse_missing_metric(session.stage, record)
    return record


def is_due(session: Session, step: int, every: int) -> bool:
    """Whether something that is done `every` so many steps is due; at the last step everything is."""
    return step == session.num_steps or (every > 0 and step % every == 0)
