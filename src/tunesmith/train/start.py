"""Where a stage starts: its optimizer, the state before its first step, or the state of its newest checkpoint.

In: a session whose model holds the stage's starting weights. Out: the state to go on from, its weights and moments in
place, and the records cut to it. Must not know: what a step does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from tunesmith.data.types import Tree
from tunesmith.engine.retry import is_out_of_memory
from tunesmith.errors import RecipeError, ResourceError
from tunesmith.model.machine import Machine
from tunesmith.model.whole import tables_of
from tunesmith.recipe.models import Lora
from tunesmith.train.checkpoint import State
from tunesmith.train.identity import StageRecipe, reference_mean, stage_identity
from tunesmith.train.modes import Checkpointing
from tunesmith.train.optim import Trainable, make_optimizer
from tunesmith.train.resume import resume
from tunesmith.train.rows import GoingOn, go_on_with_rows
from tunesmith.train.saving import finish_rotation
from tunesmith.train.session import Session
from tunesmith.version import VERSION


def as_planned(
    stage: StageRecipe, machine: Machine, forest_tokens: int | None, gradient_checkpointing: Checkpointing | None
) -> StageRecipe:
    """The stage with what a plan has found to fit; what neither it nor the recipe says is the machine's habit."""
    chosen = {
        "forest_tokens": forest_tokens or stage.forest_tokens or machine.forest_tokens,
        "gradient_checkpointing": gradient_checkpointing or stage.gradient_checkpointing or "none",
    }
    return stage.model_copy(update=chosen)


def refuse_unmeasured_best(stage: StageRecipe, heldout: Sequence[Tree]) -> None:
    """RecipeError where the best step is to be found, and nothing is held out to find it by."""
    if heldout:
        return
    where, remedy = f"stage {stage.name}", "Add `heldout` or `heldout_fraction`, or use"
    if stage.keep == "best":
        raise RecipeError("`keep: best` needs held-out rows.", where=where, remedy=f"{remedy} `keep: final`.")
    if stage.patience:
        raise RecipeError("`patience` needs held-out rows.", where=where, remedy=f"{remedy} `patience: 0`.")


def stage_optimizer(stage: StageRecipe, trainable: Trainable, model: nn.Module) -> torch.optim.Optimizer:
    """As the recipe says; ResourceError where there is no room for its moments."""
    try:
        return make_optimizer(
            trainable,
            kind=stage.optimizer,
            learning_rate=stage.learning_rate,
            betas=(stage.adam_beta1, stage.adam_beta2),
            weight_decay=stage.weight_decay,
            b_lr_ratio=stage.tuning.b_lr_ratio if isinstance(stage.tuning, Lora) else 1.0,
            tables=tables_of(model),
        )
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        numbers = sum(parameter.numel() for parameter in trainable.values())
        what = f"memory ran out while the optimizer's moments of {numbers:,} weights were made"
        remedy = "Set `optimizer: adamw_8bit` (a quarter of it) or `paged_adamw_8bit`, or train fewer weights."
        raise ResourceError(what, where=f"stage {stage.name}", remedy=remedy) from error


def _fresh_state(session: Session, inputs: Mapping[str, str]) -> State:
    """The state before the first step, and what a checkpoint must agree with to go on here."""
    begun = session.objective.start(session.trainable)
    identity = stage_identity(
        session.stage,
        seed=session.seed,
        train=session.train.trees,
        heldout=session.heldout.trees,
        replay=session.replay,
        trainable=session.trainable,
        inputs=inputs,
        autocast=session.engine.autocast,
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
        asked_tokens=session.stage.forest_tokens,
        checkpointing=session.stage.gradient_checkpointing,
        attention=session.engine.backend,
        tunesmith_version=VERSION,
        carried=dict(begun.numbers),
        tensors=begun.tensors,
    )


def going_on(session: Session, inputs: Mapping[str, str], *, rows_changed: bool, strict: bool) -> tuple[Session, State]:
    """The session, its rows perhaps begun anew, and the state to go on from; see `train_stage`. Raises ResumeError."""
    fresh = _fresh_state(session, inputs)
    tell, stage, folder = session.observer.noted, session.stage, session.folder
    rows = go_on_with_rows(session, fresh, tell=tell) if rows_changed else GoingOn(session, fresh, fresh)
    session = rows.session
    state = resume(
        folder,
        rows.expected,
        session.trainable,
        session.optimizer,
        machine=session.machine,
        warn=tell,
        strict=strict,
        keeps_best=stage.keep == "best" or stage.on_diagnosis == "rollback",
    )
    state = rows.taken(state)
    if session.machine.is_main:
        finish_rotation(folder.checkpoints, newest=state.step, keep=stage.keep_checkpoints, best=state.best_step)
    session.watch.resume(state.step, is_last=state.step == session.num_steps)
    session.memory.go_on(state.step, state.forest_tokens, state.tree_tokens)
    if state.scaler:
        session.scaler.load_state_dict(state.scaler)
    session.observer.started(stage.name, first_step=state.step, num_steps=session.num_steps)
    return session, state
