"""A stage without a model: twelve weights under AdamW, saved, resumed and rotated by the real functions.

A step takes microseconds, so a fault can be tried at every operation of a save. Its gradient is a function of step and
weights, so its last bytes tell whether weights, moments and step came back exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from tests.support.training import MACHINE
from tunesmith.runs.folder import StageFolder
from tunesmith.runs.records import Records
from tunesmith.train.checkpoint import State, find_problem, list_steps, path_of, remove_older, save_checkpoint
from tunesmith.train.optim import make_optimizer, optimizer_tensors, update
from tunesmith.train.resume import resume
from tunesmith.train.saving import finish_rotation, save_or_rescue

SAVED = "saved"
NUM_STEPS = 1000
"""Of the whole stage; tests break off long before."""


def run(path: Path, *, last: int, keep: int = 2, tell: Callable[[str], None] = lambda text: None) -> int:
    """Run to step `last` with a save after each step, or go on; returns the step that it went on from.

    tell: gets the notes of the resume and the save, and `saved` when a save has returned.
    """
    folder = StageFolder(path).create()
    weight = torch.nn.Parameter(torch.arange(12.0).reshape(3, 4) / 7)
    trainable = {"weight": weight}
    optimizer = make_optimizer(trainable, kind="adamw", learning_rate=0.1, betas=(0.9, 0.99), weight_decay=0.01)
    fresh = State(0, NUM_STEPS, None, None, None, 1, torch.__version__, {"stage": "little"})
    state = resume(folder, fresh, trainable, optimizer, machine=MACHINE, warn=tell)
    finish_rotation(folder.checkpoints, newest=state.step, keep=keep, best=None)
    records, begun = Records(), state.step
    for step in range(begun + 1, last + 1):
        weight.grad = torch.sin(weight.detach() * step)
        update(optimizer, trainable, learning_rate=0.1 / step, norm=1.0, max_norm=0.0)
        state = replace(state, step=step)
        records.append(folder.metrics_path, {"step": step, "loss": float(weight.detach().sum())})
        records.append(folder.timings_path, {"step": step, "seconds": 1.0})
        if step % 2 == 0:
            records.append(folder.eval_path, {"step": step, "loss": 1 / step})
        tensors = optimizer_tensors(optimizer, trainable)
        write = partial(save_checkpoint, state=state, weights=trainable, optimizer=tensors)
        save_or_rescue(folder, write, records=records, step=step, tell=tell)
        tell(SAVED)
        remove_older(folder.checkpoints, newest=step, keep=keep, best=None)
    return begun


def newest_whole(path: Path) -> int:
    """Step of the newest checkpoint of which every byte is as it was written; 0 where there is none."""
    folder = path / "checkpoints"
    return max((step for step in list_steps(folder) if not find_problem(path_of(folder, step))), default=0)


def content(path: Path) -> dict[str, bytes]:
    """Every file below `path`, by its name."""
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}
