"""What a stage has while it trains, and which trees a step is made of.

In: nothing. Out: the record that the loop and the gradient share. Must not know: files' formats, what a step does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.amp import GradScaler

from tunesmith.data.plan import num_steps, replay_examples, step_examples
from tunesmith.data.types import Tree
from tunesmith.engine.engine import Engine
from tunesmith.model.machine import Machine
from tunesmith.objectives import Carried, Objective
from tunesmith.recipe.models import SftStage
from tunesmith.runs.folder import StageFolder
from tunesmith.runs.records import Records
from tunesmith.runs.stop import StopRequest
from tunesmith.train.identity import StageRecipe
from tunesmith.train.optim import Trainable
from tunesmith.train.probe import Probe
from tunesmith.train.progress import Observer
from tunesmith.train.retry import StageMemory
from tunesmith.train.step import Batch
from tunesmith.train.watch import Watch


@dataclass(frozen=True, slots=True)
class RowsStart:
    """The rows are trained behind `step`, from the start of `epoch` (both count what came before them)."""

    step: int = 0
    epoch: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Session:
    """Everything of a stage that stays as it is while it trains; `carried` is what its method has at a step."""

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
    memory: StageMemory
    trainable: Trainable
    optimizer: torch.optim.Optimizer
    scaler: GradScaler
    stop: StopRequest
    watch: Watch
    rows_start: RowsStart = RowsStart()
    records: Records = field(default_factory=Records)
    carried: Carried = field(default_factory=Carried)
    probe: Probe | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Steps that see every row once."""
        return num_steps(len(self.train.trees), self.stage.batch_size, 1)

    @property
    def num_steps(self) -> int:
        """Steps of the whole stage."""
        steps = self.rows_start.step + self.steps_per_epoch * (self.stage.epochs - self.rows_start.epoch)
        return min(steps, self.stage.max_steps or steps)

    def step_of_rows(self, step: int) -> int:
        """The step's number in the order of the present rows: `step` itself, if they have not changed on the way."""
        return self.rows_start.epoch * self.steps_per_epoch + step - self.rows_start.step


def step_batch(session: Session, step: int) -> tuple[Batch, int]:
    """The trees of a step, and how many of them are the stage's own; the replayed texts follow those."""
    place = session.step_of_rows(step) - 1
    indices = step_examples(len(session.train.trees), session.stage.batch_size, seed=session.seed, step=place)
    batch = session.train.part(indices)
    if not session.replay or not isinstance(session.stage, SftStage) or session.stage.replay is None:
        return batch, len(indices)
    per_step = session.stage.replay.examples_per_step
    chosen = replay_examples(len(session.replay), per_step, seed=session.seed, step=step - 1)
    return Batch([*batch.trees, *(session.replay[index] for index in chosen)]), len(indices)
