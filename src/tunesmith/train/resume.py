"""Going on where a stage stopped, exactly, or not at all.

In: the stage's folder, its fresh state, its weights and optimizer. Out: the state to go on from; weights and moments
are put in place, and records after that step are cut off. Must not know: objectives, data, engines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from tunesmith.errors import ResumeError
from tunesmith.model.machine import Machine
from tunesmith.runs.folder import StageFolder
from tunesmith.runs.records import truncate_records
from tunesmith.train.checkpoint import (
    OPTIMIZER,
    WEIGHTS,
    Checkpoint,
    State,
    check_identity,
    load_checkpoint,
    load_newest,
    path_of,
)
from tunesmith.train.optim import Trainable, restore_optimizer

_REFERENCE_TOLERANCE = 1e-3
"""Nats a token: above what another machine's rounding makes, below what another model makes."""


def resume(
    folder: StageFolder,
    fresh: State,
    trainable: Trainable,
    optimizer: torch.optim.Optimizer,
    *,
    machine: Machine,
    warn: Callable[[str], None],
) -> State:
    """The state of the newest whole checkpoint, or `fresh` where there is none; see the module."""
    checkpoint = load_newest(folder.checkpoints, warn=warn)
    step = -1
    if checkpoint is not None:
        _check(checkpoint, fresh, warn=warn)
        step = checkpoint.state.step
    machine.barrier()  # all ranks have read before the main rank writes
    if machine.is_main:
        _cut_records(folder, step)
    if checkpoint is None:
        return fresh
    _put_weights(checkpoint, trainable)
    try:
        restore_optimizer(optimizer, trainable, checkpoint.optimizer)
    except (KeyError, ValueError) as error:
        raise ResumeError(f"{OPTIMIZER} does not fit this stage: {error}.", where=str(checkpoint.path)) from error
    saved = checkpoint.state
    return replace(
        fresh,
        step=saved.step,
        best_step=saved.best_step,
        best_loss=saved.best_loss,
        num_skipped=saved.num_skipped,
        skips_in_row=saved.skips_in_row,
        scaler=saved.scaler,
    )


def load_weights_of(folder: StageFolder, step: int, trainable: Trainable) -> None:
    """Put the weights of one checkpoint in place; raises ResumeError where it is not whole."""
    _put_weights(load_checkpoint(path_of(folder.checkpoints, step)), trainable)


def _check(checkpoint: Checkpoint, fresh: State, *, warn: Callable[[str], None]) -> None:
    check_identity(checkpoint, fresh.identity)
    saved, where = checkpoint.state, str(checkpoint.path)
    if saved.step > fresh.num_steps:
        remedy = "Nothing was changed. Ask for at least as many steps, or give the run another name."
        raise ResumeError(f"is past the {fresh.num_steps} steps that are asked for.", where=where, remedy=remedy)
    if (saved.reference_mean is None) != (fresh.reference_mean is None):
        raise ResumeError("one of checkpoint and stage has a reference, the other has none.", where=where)
    if saved.reference_mean is not None and fresh.reference_mean is not None:
        difference = abs(saved.reference_mean - fresh.reference_mean)
        if not difference <= _REFERENCE_TOLERANCE:
            what = f"the reference is another model: its mean log-prob moved by {difference:.4g} nats a token."
            raise ResumeError(what, where=where)
    if saved.num_steps != fresh.num_steps:
        warn(f"The stage had {saved.num_steps} steps and has {fresh.num_steps} now; the schedule spans the new number.")
    if (saved.threads, saved.torch_version) != (fresh.threads, fresh.torch_version):
        then = f"torch {saved.torch_version} on {saved.threads} threads"
        now = f"torch {fresh.torch_version} on {fresh.threads}"
        warn(f"The checkpoint is of {then}, this is {now}: the result can differ in rounding from an unbroken run.")


def _put_weights(checkpoint: Checkpoint, trainable: Trainable) -> None:
    weights: Mapping[str, Tensor] = checkpoint.weights
    misfits = [name for name in trainable if name not in weights or weights[name].shape != trainable[name].shape]
    if misfits or len(weights) != len(trainable):
        what = (
            f"{WEIGHTS} does not hold exactly the trained tensors; the first misfit is {[*misfits, 'an extra one'][0]}."
        )
        raise ResumeError(what, where=str(checkpoint.path))
    with torch.no_grad():
        for name, parameter in trainable.items():
            parameter.copy_(weights[name])


def _cut_records(folder: StageFolder, step: int) -> None:
    """Leave the records up to `step` (-1: none); exactly one a step must be there."""
    kept = [record["step"] for record in truncate_records(folder.metrics_path, step)]
    if kept != list(range(1, step + 1)):
        remedy = "Restore it from a copy, or delete the stage's folder to train it again from its start."
        what = f"has {len(kept)} records for the {step} steps of the checkpoint."
        raise ResumeError(what, where=str(folder.metrics_path), remedy=remedy)
    for path in (folder.timings_path, folder.eval_path):
        truncate_records(path, step)
