"""The loop: one stage from its first step, or its newest checkpoint, to its last.

In: an engine, the stage of the recipe, its trees, a folder. Out: trained weights in the model; records and checkpoints
in the folder; what came out, as a StageOutcome. Must not know: what an objective computes, tokenizers, adapters' files.

A step is a set of examples, a pure function of (seed, step). Steps count from 1; step 0 is the start.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from tunesmith.data.plan import num_steps, replay_examples, step_examples
from tunesmith.data.types import Tree
from tunesmith.engine.engine import Engine
from tunesmith.errors import NumericsError, RecipeError, ResourceError, StoppedError
from tunesmith.model.machine import Machine
from tunesmith.objectives import Objective
from tunesmith.recipe.models import Lora, SftStage
from tunesmith.runs.folder import StageFolder
from tunesmith.runs.records import Record, append_record, sync_records
from tunesmith.train.checkpoint import State, remove_older, save_checkpoint
from tunesmith.train.evaluate import check_reference, evaluate
from tunesmith.train.identity import StageRecipe, reference_mean, stage_identity
from tunesmith.train.modes import Dropout, training_mode
from tunesmith.train.optim import Trainable, gradient_norm, make_adamw, optimizer_tensors, trainable_parameters, update
from tunesmith.train.progress import Observer, Silent
from tunesmith.train.resume import load_weights_of, resume
from tunesmith.train.schedule import lr_multiplier
from tunesmith.train.signals import stop_requests
from tunesmith.train.step import Array, Batch, StepResult, accumulate, name_rows

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


@dataclass(frozen=True, slots=True, eq=False)
class Session:
    """Everything of a stage that stays as it is while it trains."""

    engine: Engine
    stage: StageRecipe
    objective: Objective
    train: Batch
    heldout: Batch
    replay: Sequence[Tree]
    folder: StageFolder
    seed: int
    machine: Machine
    observer: Observer
    num_steps: int
    steps_per_epoch: int
    forest_tokens: int
    trainable: Trainable
    optimizer: torch.optim.AdamW


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
) -> StageOutcome:
    """Train one stage; where the folder has checkpoints, go on from the newest.

    The model must hold the stage's starting weights, trained ones float32 and marked by `requires_grad`. `inputs`
    names what else the result depends on (hashes of base and template); a checkpoint of other inputs is refused.
    Raises ResumeError (3), NumericsError (4), ResourceError (5), StoppedError (130, 143).
    """
    if stage.keep == "best" and not heldout:
        remedy = "Add `heldout` or `heldout_fraction`, or use `keep: final`."
        raise RecipeError("`keep: best` needs held-out rows.", where=f"stage {stage.name}", remedy=remedy)
    trainable = trainable_parameters(engine.model)
    steps = num_steps(len(train), stage.batch_size, stage.epochs)
    session = Session(
        engine=engine,
        stage=stage,
        objective=objective,
        train=Batch(train, references[0] if references else None),
        heldout=Batch(heldout, references[1] if references else None),
        replay=replay,
        folder=folder.create() if machine.is_main else folder,
        seed=seed,
        machine=machine,
        observer=(observer or Silent()) if machine.is_main else Silent(),
        num_steps=min(steps, stage.max_steps or steps),
        steps_per_epoch=num_steps(len(train), stage.batch_size, 1),
        forest_tokens=stage.forest_tokens or machine.forest_tokens,
        trainable=trainable,
        optimizer=make_adamw(
            trainable,
            learning_rate=stage.learning_rate,
            betas=(stage.adam_beta1, stage.adam_beta2),
            weight_decay=stage.weight_decay,
        ),
    )
    machine.barrier()
    fresh = _fresh_state(session, inputs or {})
    try:
        state = resume(
            session.folder, fresh, trainable, session.optimizer, machine=machine, warn=session.observer.noted
        )
        session.observer.started(stage.name, first_step=state.step, num_steps=session.num_steps)
        return _train(session, state)
    finally:
        session.observer.finished()


def _fresh_state(session: Session, inputs: Mapping[str, str]) -> State:
    """The state before the first step, and what a checkpoint must agree with to go on here."""
    identity = stage_identity(
        session.stage,
        seed=session.seed,
        train=session.train.trees,
        heldout=session.heldout.trees,
        replay=session.replay,
        trainable=session.trainable,
        inputs=inputs,
    )
    return State(
        step=0,
        num_steps=session.num_steps,
        best_step=None,
        best_loss=None,
        reference_mean=reference_mean(session.train),
        threads=session.machine.threads,
        torch_version=torch.__version__,
        identity=identity,
    )


def _train(session: Session, state: State) -> StageOutcome:
    resumed_step = state.step
    if state.step == 0:
        _check_start(session)
        _evaluate(session, state)
    modes = training_mode(
        session.engine.model,
        dropout=_dropout_of(session),
        gradient_checkpointing=session.stage.gradient_checkpointing or "none",
    )
    with modes, stop_requests() as stop:
        while state.step < session.num_steps:
            state = replace(state, step=state.step + 1)
            _step(session, state.step)
            state, is_best = _evaluate_if_due(session, state)
            number = session.machine.largest(stop.number)
            if number or is_best or _is_due(session, state.step, session.stage.save_every):
                _save(session, state)
            if number:
                raise StoppedError(
                    f"stopped after step {state.step} of {session.num_steps}; it is saved.",
                    signal_number=number,
                    where=f"stage {session.stage.name}",
                    remedy="The same command goes on from there.",
                )
    result_step = state.step
    if session.stage.keep == "best" and state.best_step not in (None, state.step):
        assert state.best_step is not None
        load_weights_of(session.folder, state.best_step, session.trainable)
        result_step = state.best_step
    return StageOutcome(session.num_steps, resumed_step, result_step, state.best_step, state.best_loss)


def step_batch(session: Session, step: int) -> tuple[Batch, int]:
    """The trees of a step, and how many of them are the stage's own; the replayed texts follow those."""
    indices = step_examples(len(session.train.trees), session.stage.batch_size, seed=session.seed, step=step - 1)
    batch = session.train.part(indices)
    if not session.replay or not isinstance(session.stage, SftStage) or session.stage.replay is None:
        return batch, len(indices)
    per_step = session.stage.replay.examples_per_step
    chosen = replay_examples(len(session.replay), per_step, seed=session.seed, step=step - 1)
    return Batch([*batch.trees, *(session.replay[index] for index in chosen)]), len(indices)


def _step(session: Session, step: int) -> None:
    """One update and its records; no update where anything is not finite."""
    start = time.monotonic()
    batch, num_own = step_batch(session, step)
    learning_rate = session.stage.learning_rate * lr_multiplier(
        step, session.num_steps, warmup_fraction=session.stage.warmup_fraction, kind=session.stage.schedule
    )
    result, norm = _gradient(session, batch, step)
    update(
        session.optimizer,
        session.trainable,
        learning_rate=learning_rate,
        norm=norm,
        max_norm=session.stage.max_grad_norm,
    )
    seconds = time.monotonic() - start
    record: Record = {
        "step": step,
        "epoch": step / session.steps_per_epoch,
        "loss": result.loss.mean(),
        "lr": learning_rate,
        "grad_norm": norm,
        "num_examples": num_own,
        "num_replay": len(batch.trees) - num_own,
        "num_tokens": result.num_tokens,
        "num_trained": result.num_trained,
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
        append_record(session.folder.metrics_path, record)
        append_record(session.folder.timings_path, timing)
    session.observer.stepped(record, timing)


def _gradient(session: Session, batch: Batch, step: int) -> tuple[StepResult, float]:
    """The step's gradient on the weights, and its norm; NumericsError where either is not finite."""
    where = f"stage {session.stage.name}, step {step}"
    remedy = "No update was made. Look at these rows; a lower learning rate or float32 may help."
    try:
        result = accumulate(
            session.engine,
            batch,
            objective=session.objective,
            forest_tokens=session.forest_tokens,
            machine=session.machine,
            seed_key=f"{session.seed}/{session.stage.name}/{step}",
        )
    except NumericsError as error:
        session.optimizer.zero_grad()
        raise NumericsError(error.what, where=where, remedy=remedy) from error
    except torch.OutOfMemoryError as error:
        longest = max(batch.trees, key=lambda tree: tree.num_tokens)
        what = f"the device's memory is full; the longest row, {longest.id}, has {longest.num_tokens} tokens."
        half = max(1, session.forest_tokens // 2)
        raise ResourceError(
            what, where=where, remedy=f"Try `forest_tokens: {half}`: the result is the same."
        ) from error
    if step == 1 and result.num_untouched:
        session.observer.noted(f"{result.num_untouched} trained tensors got no gradient in step 1.")
    norm = gradient_norm(session.trainable.values())
    if not math.isfinite(norm) or not math.isfinite(result.loss.mean()):
        session.optimizer.zero_grad()
        rows = name_rows([tree.id for tree in batch.trees])
        what = f"loss {result.loss.mean()}, gradient norm {norm}; the step's rows: {rows}."
        raise NumericsError(what, where=where, remedy=remedy)
    return result, norm


def _check_start(session: Session) -> None:
    if not session.objective.needs_reference:
        return
    found, expected = check_reference(
        session.engine,
        step_batch(session, 1)[0],
        objective=session.objective,
        forest_tokens=session.forest_tokens,
        machine=session.machine,
    )
    session.observer.noted(f"step 0: the policy is its reference, loss {found:.7f} (expected {expected:.7f})")


def _evaluate(session: Session, state: State) -> float | None:
    """Evaluate and record; the held-out loss, or None where nothing is held out."""
    if not session.heldout.trees:
        return None
    figures = evaluate(
        session.engine,
        session.heldout,
        objective=session.objective,
        forest_tokens=session.forest_tokens,
        machine=session.machine,
    )
    record: Record = {"step": state.step, **figures}
    if session.machine.is_main:
        append_record(session.folder.eval_path, record)
    session.observer.evaluated(record)
    loss = figures["loss"]
    assert isinstance(loss, float)
    return loss


def _evaluate_if_due(session: Session, state: State) -> tuple[State, bool]:
    """The state after an evaluation, and whether this step is the best so far; step 0 is no result, so no best."""
    if not _is_due(session, state.step, session.stage.eval_every):
        return state, False
    loss = _evaluate(session, state)
    if loss is None or (state.best_loss is not None and not loss < state.best_loss):
        return state, False
    return replace(state, best_step=state.step, best_loss=loss), True


def _is_due(session: Session, step: int, every: int) -> bool:
    return step == session.num_steps or (every > 0 and step % every == 0)


def _save(session: Session, state: State) -> None:
    if session.machine.is_main:
        for path in (session.folder.metrics_path, session.folder.eval_path):
            sync_records(path)
        save_checkpoint(
            session.folder.checkpoints,
            state=state,
            weights=session.trainable,
            optimizer=optimizer_tensors(session.optimizer, session.trainable),
        )
        keep = session.stage.keep_checkpoints
        remove_older(session.folder.checkpoints, newest=state.step, keep=keep, best=state.best_step)
    session.machine.barrier()


def _dropout_of(session: Session) -> Dropout:
    """Supervised stages train with the model's dropouts; preference stages with the recipe's, or with none."""
    if session.objective.num_answers == 1:
        return "model"
    tuning = session.stage.tuning
    return "adapter" if isinstance(tuning, Lora) and tuning.dropout > 0 else "off"
