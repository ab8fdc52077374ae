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
    OBJECTIVE,
    OPTIMIZER,
    STATE,
    WEIGHTS,
    Checkpoint,
    State,
    check_identity,
    find_problem,
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
    strict: bool = False,
    keeps_best: bool = False,
) -> State:
    """The state of the newest whole checkpoint, or `fresh` where there is none; see the module.

    Raises ResumeError where there are checkpoints and none of them is whole and fits; with `strict` where the newest
    is not whole; with `keeps_best` where the best so far is not, which would be missed after the last step only.
    """
    checkpoint = load_newest(folder.checkpoints, warn=warn, strict=strict)
    step = -1
    if checkpoint is not None:
        _check(checkpoint, fresh, warn=warn)
        if keeps_best and checkpoint.state.best_step not in (None, checkpoint.state.step):
            _check_best(folder, checkpoint.state.best_step)
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
    same_budget = saved.asked_tokens == fresh.asked_tokens
    # what decides rounding is as it is now; all that is not named here is as it was
    return replace(
        saved,
        num_steps=fresh.num_steps,
        reference_mean=fresh.reference_mean,
        threads=fresh.threads,
        torch_version=fresh.torch_version,
        tunesmith_version=fresh.tunesmith_version,
        identity=fresh.identity,
        asked_tokens=fresh.asked_tokens,
        forest_tokens=saved.forest_tokens if same_budget else None,
        tree_tokens=saved.tree_tokens if same_budget else None,
        checkpointing=fresh.checkpointing,
        attention=fresh.attention,
        tensors=_carried_tensors(checkpoint, fresh),
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
    _warn_of_rounding(saved, fresh, warn=warn)


def _check_best(folder: StageFolder, step: int | None) -> None:
    assert step is not None
    path = path_of(folder.checkpoints, step)
    problem = find_problem(path) if path.exists() else "is missing"
    if problem:
        remedy = "Restore it from a copy, or set `keep: final`, which needs the last weights only."
        raise ResumeError(f"the checkpoint of the best step so far: {problem}.", where=str(path), remedy=remedy)


def _warn_of_rounding(saved: State, fresh: State, *, warn: Callable[[str], None]) -> None:
    """Say what decides the order of sums and is no longer as it was; checkpoints of before may not name it."""
    pairs = {
        "torch": (saved.torch_version, fresh.torch_version),
        "threads": (saved.threads, fresh.threads),
        "the attention kernel": (saved.attention, fresh.attention),
        "tokens of a micro-batch": (saved.asked_tokens, fresh.asked_tokens),
        "gradient checkpointing": (saved.checkpointing, fresh.checkpointing),
        "the reference's mean log-prob": (saved.reference_mean, fresh.reference_mean),  # scored anew, packed otherwise
    }
    changed = [f"{name} {then}, now {now}" for name, (then, now) in pairs.items() if then not in (None, now)]
    if changed:
        what = "; ".join(changed)
        warn(f"The checkpoint was made with {what}: the result can differ in rounding from an unbroken run.")


def _carried_tensors(checkpoint: Checkpoint, fresh: State) -> dict[str, Tensor]:
    """What the method carries, on the stage's device; ResumeError where it is not exactly what the method has."""
    saved, where = checkpoint.state, str(checkpoint.path)
    names = sorted(saved.carried.keys() ^ fresh.carried.keys())
    if names:
        raise ResumeError(f"{STATE} does not hold what the method carries: {names[0]} is on one side.", where=where)
    kinds = [{name: (tensor.shape, tensor.dtype) for name, tensor in state.tensors.items()} for state in (saved, fresh)]
    misfits = sorted(name for name in kinds[0].keys() | kinds[1].keys() if kinds[0].get(name) != kinds[1].get(name))
    if misfits:
        raise ResumeError(f"{OBJECTIVE} does not hold what the method carries: {misfits[0]}.", where=where)
    return {name: saved.tensors[name].to(tensor.device) for name, tensor in fresh.tensors.items()}


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
