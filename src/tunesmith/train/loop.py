"""The loop: one stage from its first step, or its newest checkpoint, to its last.

In: an engine, the stage of the recipe, its trees, a folder. Out: trained weights in the model; records and checkpoints
in the folder; what came out, as a StageOutcome. Must not know: what an objective computes, tokenizers, adapters' files.

A step is a set of examples, a pure function of (seed, step). Steps count from 1; step 0 is the start.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from tunesmith.data.types import Tree
from tunesmith.engine.engine import Engine
from tunesmith.engine.retry import Budget
from tunesmith.errors import NumericsError, ResourceError, TunesmithError
from tunesmith.model.machine import Machine
from tunesmith.objectives import Objective
from tunesmith.recipe.models import Lora
from tunesmith.recipe.preferences import PreferenceStage
from tunesmith.runs.folder import StageFolder
from tunesmith.runs.records import Record
from tunesmith.runs.stop import StopRequest, caught
from tunesmith.train.applying import apply_gradient
from tunesmith.train.averaged import averaged, settle
from tunesmith.train.best import is_over
from tunesmith.train.carried import advanced, bound
from tunesmith.train.checkpoint import State, path_of, remove_older, save_checkpoint
from tunesmith.train.diagnosing import Diagnosing
from tunesmith.train.evaluate import check_reference
from tunesmith.train.evaluating import evaluate_if_due, evaluate_now, is_due
from tunesmith.train.gradient import step_gradient
from tunesmith.train.identity import StageRecipe
from tunesmith.train.modes import Checkpointing, Dropout, training_mode
from tunesmith.train.optim import optimizer_tensors, trainable_parameters
from tunesmith.train.policy import ends_by, refuse_problem, rolled_back, tell_rollback
from tunesmith.train.precision import make_scaler, refuse_endless_skips
from tunesmith.train.probe import Probe, begun
from tunesmith.train.progress import Observer, Silent
from tunesmith.train.resume import load_weights_of
from tunesmith.train.retry import StageMemory
from tunesmith.train.saving import save_or_rescue
from tunesmith.train.schedule import lr_multiplier
from tunesmith.train.session import Session, step_batch
from tunesmith.train.start import as_planned, going_on, refuse_unmeasured_best, stage_optimizer
from tunesmith.train.step import Array, Batch
from tunesmith.train.stopping import LeftError, expect_save, is_evaluated, stop_number, stopped
from tunesmith.train.watch import start_watch

References = tuple[Sequence[Array], Sequence[Array]]
"""Of the training trees and of the held-out trees: per tree one float32 log-prob a trained token."""


@dataclass(frozen=True, slots=True)
class StageOutcome:
    """What a stage came to. Losses are means; `result_step` is the step whose weights the model holds now."""

    num_steps: int
    resumed_step: int
    result_step: int
    best_step: int | None
    best_loss: float | None


def train_stage(
    *,
    engine: Engine,
    stage: StageRecipe,
    objective: Objective,
    train: Sequence[Tree],
    heldout: Sequence[Tree] = (),
    replay: Sequence[Tree] = (),
    references: References | None = None,
    folder: StageFolder,
    seed: int,
    machine: Machine,
    observer: Observer | None = None,
    inputs: Mapping[str, str] | None = None,
    forest_tokens: int | None = None,
    gradient_checkpointing: Checkpointing | None = None,
    stop: StopRequest | None = None,
    rows_changed: bool = False,
    strict: bool = False,
    probe: Probe | None = None,
) -> StageOutcome:
    """Train one stage; where the folder has checkpoints, go on from the newest.

    The model must hold the stage's starting weights, trained ones float32 and marked by `requires_grad`. `inputs` names
    what else the result depends on (hashes of base and template); a checkpoint of other inputs is refused.
    `forest_tokens` and `gradient_checkpointing`, where given, stand for the stage's: a plan has found what fits. `stop`
    is the command's own; without one, signals are caught here. `rows_changed`: a person has accepted that the rows are
    not those that the stage began on. `strict`: a damaged checkpoint is an error, where else an older one is taken.
    `probe`: what evaluations look at besides the held-out loss.
    Raises ResumeError (3), NumericsError (4), ResourceError (5), StoppedError (130, 143).
    """
    refuse_unmeasured_best(stage, heldout)
    stage = as_planned(stage, machine, forest_tokens, gradient_checkpointing)
    folder, observer = _ready(folder, observer, machine)
    trainable, diagnosing, writes = trainable_parameters(engine.model), Diagnosing.of(stage), machine.is_main
    watch = start_watch(folder, trainable=trainable, observer=observer, writes=writes, diagnosing=diagnosing)
    session = Session(
        engine=engine,
        stage=stage,
        objective=objective,
        train=Batch(train, references[0] if references else None),
        heldout=Batch(heldout, references[1] if references else None),
        replay=replay,
        folder=folder,
        seed=seed,
        machine=machine,
        observer=observer,
        memory=StageMemory(folder, stage, machine=machine, observer=observer),
        trainable=trainable,
        optimizer=stage_optimizer(stage, trainable, engine.model),
        scaler=make_scaler(engine.dtype, machine.device),
        stop=stop or StopRequest(),
        watch=watch,
        probe=probe and begun(probe, engine.model, trainable, tell=observer.noted),
    )
    try:
        session, state = going_on(session, inputs or {}, rows_changed=rows_changed, strict=strict)
        return _train(session, state)
    finally:
        session.observer.finished()


def _ready(folder: StageFolder, observer: Observer | None, machine: Machine) -> tuple[StageFolder, Observer]:
    """The stage's folder, made by the main rank before any goes on, and who is told: nobody on the others."""
    folder = folder.create() if machine.is_main else folder
    machine.barrier()
    return folder, (observer or Silent()) if machine.is_main else Silent()


def _train(session: Session, state: State) -> StageOutcome:
    resumed_step = state.step
    if state.step == 0:
        _check_start(bound(session, state))
        evaluate_now(bound(session, state), state)
    modes = training_mode(
        session.engine.model,
        dropout=_dropout_of(session),
        gradient_checkpointing=session.stage.gradient_checkpointing or "none",
        offload=session.stage.offload_activations,
    )
    expect_save(session)
    with modes, caught(session.stop):
        state = _evaluate_if_missed(session, state)
        while state.step < session.num_steps and not ends_by(session) and not is_over(session.stage, state):
            before = _step(bound(session, state), replace(state, step=state.step + 1))
            state, is_best = _evaluate_if_due(bound(session, before), before)
            state = rolled_back(session, before, state)
            evaluates_next = is_due(session, state.step + 1, session.stage.eval_every)
            number = stop_number(session, evaluates_next=evaluates_next)
            is_due_now = is_best or is_due(session, state.step, session.stage.save_every)
            is_end = ends_by(session) or is_over(session.stage, state)
            if number or is_due_now or session.records.behind or is_end:
                _save(session, state)
                number = stop_number(session, evaluates_next=evaluates_next)  # one may have come meanwhile
            if number:
                raise stopped(session, state.step, number)
    refuse_problem(session, state)
    settle(session.optimizer)
    result_step = state.step
    if (session.stage.keep == "best" or ends_by(session)) and state.best_step not in (None, state.step):
        assert state.best_step is not None
        load_weights_of(session.folder, state.best_step, session.trainable)
        result_step = state.best_step
        if ends_by(session):
            tell_rollback(session, state)
    return StageOutcome(session.num_steps, resumed_step, result_step, state.best_step, state.best_loss)


def _step(session: Session, state: State) -> State:
    """One update and its records; no update where anything is not finite."""
    start = time.monotonic()
    step = state.step
    batch, num_own = step_batch(session, step)
    learning_rate = session.stage.learning_rate * lr_multiplier(
        step - state.num_skipped,
        session.num_steps,
        warmup_fraction=session.stage.warmup_fraction,
        kind=session.stage.schedule,
    )
    try:
        found = step_gradient(session, batch, step, num_nonfinite=state.num_nonfinite)
    except (NumericsError, ResourceError, LeftError):
        _save_if_new(session, replace(state, step=step - 1))
        raise
    state, scaling = apply_gradient(session, state, found, learning_rate)
    state = advanced(session, state, found)
    result = found.result
    seconds = time.monotonic() - start
    record: Record = {
        "step": step,
        "epoch": session.step_of_rows(step) / session.steps_per_epoch,
        "loss": result.loss.mean(),
        "lr": learning_rate,
        "grad_norm": found.norm,
        "num_examples": num_own,
        "num_replay": len(batch.trees) - num_own,
        "num_tokens": result.num_tokens,
        "num_trained": result.num_trained,
        **scaling,
        **{name: value.mean() for name, value in result.metrics.items()},
    }
    timing: Record = {
        "step": step,
        "seconds": seconds,
        "tokens_per_second": result.num_tokens / seconds,
        "examples_per_second": num_own / seconds,
        "memory_bytes": session.machine.memory_bytes(),
    }
    if session.machine.is_main:
        session.records.append(session.folder.metrics_path, record)
        session.records.append(session.folder.timings_path, timing)
    session.stop.took("step", seconds)
    session.observer.stepped(record, timing)
    session.watch.stepped(record, [tree.id for tree in batch.trees], is_last=step == session.num_steps)
    refuse_endless_skips(
        state.skips_in_row, session.scaler.get_scale(), where=f"stage {session.stage.name}, step {step}"
    )
    return state


def _check_start(session: Session) -> None:
    if not session.objective.needs_reference:
        return
    batch, _ = step_batch(session, 1)

    def work(budget: Budget) -> tuple[float, float]:
        return check_reference(
            session.engine,
            batch,
            objective=session.objective,
            forest_tokens=budget.forest_tokens,
            tree_tokens=budget.tree_tokens,
            machine=session.machine,
        )

    found, expected = session.memory.run(work, batch.trees, step=0, phase="eval")
    session.observer.noted(f"step 0: the policy is its reference, loss {found:.7f} (expected {expected:.7f})")


def _evaluate_if_due(session: Session, state: State) -> tuple[State, bool]:
    """As `evaluate_if_due`; what was trained is saved where a signal ends it."""
    try:
        with averaged(session.optimizer, session.trainable):
            return evaluate_if_due(session, state)
    except LeftError:
        _save_if_new(session, state)
        raise


def _evaluate_if_missed(session: Session, state: State) -> State:
    """An earlier start was stopped between the save of its last step and the evaluation of that step."""
    if state.step == 0 or is_evaluated(session, state.step):
        return state
    before = state
    state, is_best = _evaluate_if_due(bound(session, before), before)
    state = rolled_back(session, before, state)
    if is_best:
        _save(session, state)
    return state


def _save_if_new(session: Session, state: State) -> None:
    """Before an error that no step can follow: nothing of what was trained is lost, and the error is told first."""
    if state.step == 0 or path_of(session.folder.checkpoints, state.step).exists():
        return
    try:
        _save(session, state)
    except TunesmithError as problem:
        session.observer.noted(f"step {state.step} could not be saved: {problem}")


def _save(session: Session, state: State) -> None:
    start = time.monotonic()
    if session.machine.is_main:
        budget = session.memory.budget(state.step, "eval")
        state = replace(state, forest_tokens=budget.forest_tokens, tree_tokens=budget.tree_tokens)
        write = partial(
            save_checkpoint,
            state=replace(state, scaler=session.scaler.state_dict()),
            weights=session.trainable,
            optimizer=optimizer_tensors(session.optimizer, session.trainable),
        )
        with averaged(session.optimizer, session.trainable):
            save_or_rescue(session.folder, write, records=session.records, step=state.step, tell=session.observer.noted)
        keep = session.stage.keep_checkpoints
        remove_older(session.folder.checkpoints, newest=state.step, keep=keep, best=state.best_step)
    session.machine.barrier()
    session.stop.took("save", time.monotonic() - start)


def _dropout_of(session: Session) -> Dropout:
    """Supervised stages train with the model's dropouts; preference stages with the recipe's, or with none."""
    if not isinstance(session.stage, PreferenceStage):
        return "model"
    tuning = session.stage.tuning
    return "adapter" if isinstance(tuning, Lora) and tuning.dropout > 0 else "off"
