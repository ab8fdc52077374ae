"""What follows from a problem that a diagnosis found: nothing, the run's end, or the stage's end at an earlier step.

In: a session, whose watch has the findings; the loop's state. Out: whether and how the stage ends.
Must not know: how a curve is judged, how a state is saved.
"""

from __future__ import annotations

from dataclasses import replace

from tunesmith.errors import NumericsError
from tunesmith.train.checkpoint import State, path_of
from tunesmith.train.session import Session


def ends_by(session: Session) -> str:
    """`stop` or `rollback` where there is a problem that ends the stage now, the same on every rank; else empty."""
    policy = session.stage.on_diagnosis
    if policy == "warn":
        return ""
    diagnosing = session.watch.diagnosing
    return policy if session.machine.largest(int(diagnosing is not None and diagnosing.problem is not None)) else ""


def rolled_back(session: Session, before: State, state: State) -> State:
    """Where the stage rolls back: the state that has its best step from before the problem. `before`: the state before
    this step's evaluation, at which the problem was seen."""
    if ends_by(session) != "rollback" or state.best_step == before.best_step:
        return state
    return replace(state, best_step=before.best_step, best_loss=before.best_loss)


def refuse_problem(session: Session, state: State) -> None:
    """End the run, behind a save, where the recipe says stop; or roll back, and there is nothing to roll back to.

    Raises NumericsError (4), which tells the problem, its cause and its remedy.
    """
    policy = ends_by(session)
    has_best = state.best_step is not None and path_of(session.folder.checkpoints, state.best_step).exists()
    if not policy or (policy == "rollback" and has_best):
        return
    diagnosing = session.watch.diagnosing
    problem = diagnosing.problem if diagnosing is not None else None
    told = "another rank has the records" if problem is None else f"{problem.name}: {problem.evidence}"
    remedy = "" if problem is None else f"Cause: {problem.cause}. {problem.remedy}"
    saved = f"Step {state.step} of {session.num_steps} is saved." if state.step else "Nothing was trained yet."
    why = "" if policy == "stop" else "; no evaluation before it has a checkpoint to roll back to"
    raise NumericsError(
        f"{told}{why}. {saved}",
        where=f"stage {session.stage.name}",
        remedy=f"{remedy} Give the run another `name` then, or set `on_diagnosis: warn` to go on as it is.".strip(),
    )


def tell_rollback(session: Session, state: State) -> None:
    """Say what the stage's result is."""
    diagnosing = session.watch.diagnosing
    problem = diagnosing.problem if diagnosing is not None else None
    name = "a problem" if problem is None else problem.name
    session.observer.noted(
        f"step {state.step}: {name} ends the stage (`on_diagnosis: rollback`); its result is step {state.best_step}, "
        f"the best one before ({session.stage.best_metric} {state.best_loss:.6g} on held-out rows)"
    )
