"""`memory: auto`: how large micro-batches are and what is recomputed, so that a stage fits; decided once a stage.

In: a stage, its rows, the loaded engine, the machine. Out: a MemoryPlan, kept in the stage's folder and read again on
resume, so that a resumed run computes the very same. Must not know: how a step trains, what is compared afterwards.

A prediction from shapes chooses what is recomputed; a trial on the longest rows, forward and backward without an
update, then measures, and the size of micro-batches follows from it. Where memory is plenty neither is needed.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn

from tunesmith.data.store import sizes_of
from tunesmith.data.types import Tree
from tunesmith.engine.engine import Engine
from tunesmith.engine.retry import is_out_of_memory
from tunesmith.errors import ResourceError
from tunesmith.model.machine import Machine
from tunesmith.model.memory import cap, forget_peak, give_back_large_blocks, highest_bytes
from tunesmith.model.shapes import shapes_for_training, weight_bytes
from tunesmith.objectives import objective_of
from tunesmith.pipeline.memory_predict import (
    GIB,
    Setting,
    StageShapes,
    dropout_of,
    longest_trees,
    moments_bytes,
)
from tunesmith.pipeline.memory_stages import choose, memory_limit, scaled, smallest, target_here
from tunesmith.recipe.models import Model, Stage
from tunesmith.runs.atomic import make_folder, write_json
from tunesmith.train.modes import Checkpointing, training_mode

FILE = "memory.json"
ROUGH_FACTOR = 3
"""Bytes kept a token, over those of all linear layers' inputs and outputs, are taken to be at most this. A bound chosen
for safety, not a measurement: it decides only whether memory is plenty, and the step's retry stands behind it."""
PLENTY = 2
"""Memory is plenty where a rough bound, times this, fits: then nothing is traced or tried."""
SMALLEST_TRIAL = 64


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What a stage runs with. Bytes are of the whole process on a CPU, of the allocator on a card.

    measured_bytes: the trial's peak with what the update adds; None where nothing was tried.
    """

    forest_tokens: int
    gradient_checkpointing: Checkpointing
    offload: bool
    predicted_bytes: int
    measured_bytes: int | None
    limit_bytes: int
    notes: tuple[str, ...] = ()

    def line(self) -> str:
        """One line for the first lines of a run."""
        what = f"micro-batches of {self.forest_tokens:,} tokens, gradient checkpointing {self.gradient_checkpointing}"
        peak = f"at most {self.predicted_bytes / GIB:.2f} GiB expected"
        if self.measured_bytes is not None:
            peak = f"{self.predicted_bytes / GIB:.2f} GiB predicted, {self.measured_bytes / GIB:.2f} GiB in a trial"
        return "; ".join((f"memory: {what}; {peak} of {self.limit_bytes / GIB:.2f} GiB", *self.notes))


def fixed_plan(stage: Stage, machine: Machine) -> MemoryPlan:
    """The plan of `memory: fixed`: the recipe's values, else the device's usual ones."""
    tokens = stage.forest_tokens or machine.forest_tokens
    policy: Checkpointing = stage.gradient_checkpointing or "none"
    return MemoryPlan(tokens, policy, stage.offload_activations, 0, None, 0, ("nothing was predicted",))


def plan_stage_memory(
    engine: Engine,
    stage: Stage,
    *,
    trees: Sequence[Tree],
    model: Model,
    memory: str,
    machine: Machine,
    folder: Path,
    tell: Callable[[str], None] = lambda text: None,
) -> MemoryPlan:
    """The stage's plan: the one in its folder where it still fits, else a new one, which is written there.

    `memory`: the recipe's word. Raises ResourceError where nothing that the recipe leaves open fits.
    """
    if memory == "fixed":
        return fixed_plan(stage, machine)
    limit = memory_limit(memory)
    target = target_here(memory, model, machine)
    if limit is not None:
        cap(machine.device, limit - target.floor_bytes)  # of a card: its context lies beside what is allocated
        give_back_large_blocks(machine.device)
    kept = read_plan(folder, stage)
    if kept is not None and _highest(kept) <= target.limit_bytes:
        return kept
    if kept is not None:
        wanted, there = _highest(kept) / GIB, target.limit_bytes / GIB
        tell(f"memory: the stage's plan needs {wanted:.2f} GiB, {there:.2f} GiB are there now; it is made anew")
    plan = _plenty(engine, stage, trees, target.limit_bytes, target.floor_bytes, machine) if limit is None else None
    if plan is None:
        give_back_large_blocks(machine.device)
        shapes = shapes_for_training(model, stage.tuning, dtype=target.dtype, scores=not stage.makes_policy)
        try:
            plan = _planned(engine, StageShapes(stage, shapes, trees, target), machine)
        except RuntimeError as problem:  # what the model does depends on its values, as where experts are chosen
            reason = f"not predicted, its shapes depend on values: {str(problem).splitlines()[0][:100]}"
            plan = replace(fixed_plan(stage, machine), limit_bytes=target.limit_bytes, notes=(reason,))
    make_folder(folder)
    write_json(folder / FILE, asdict(plan))
    tell(plan.line())
    return plan


def _highest(plan: MemoryPlan) -> int:
    return max(plan.predicted_bytes, plan.measured_bytes or 0)


def read_plan(folder: Path, stage: Stage) -> MemoryPlan | None:
    """The plan that the stage's folder keeps; None where there is none, or the recipe has since set something else."""
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text("utf-8"))
        plan = MemoryPlan(**{**values, "notes": tuple(values["notes"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None
    asked = stage.forest_tokens or plan.forest_tokens, stage.gradient_checkpointing or plan.gradient_checkpointing
    same = (*asked, stage.offload_activations) == (plan.forest_tokens, plan.gradient_checkpointing, plan.offload)
    return plan if same else None


def _plenty(
    engine: Engine, stage: Stage, trees: Sequence[Tree], limit: int, floor: int, machine: Machine
) -> MemoryPlan | None:
    """The plan where a rough bound on everything fits twice."""
    weights = weight_bytes(engine.model)
    sizes = sizes_of(trees).num_tokens
    tokens = max(stage.forest_tokens or machine.forest_tokens, int(sizes.max()))
    tokens = min(tokens, int(sizes.sum()))
    linears = [module for module in engine.model.modules() if isinstance(module, nn.Linear)]
    kept = 4 * ROUGH_FACTOR * tokens * sum(layer.in_features + layer.out_features for layer in linears)
    moments = moments_bytes(stage.optimizer, weights, machine.device.type)
    bound = floor + weights.frozen + weights.trained + 4 * weights.num_trained + moments + kept
    if PLENTY * bound > limit:
        return None
    setting = fixed_plan(stage, machine)
    return replace(setting, predicted_bytes=bound, limit_bytes=limit, notes=("memory is plenty: no trial",))


def _planned(engine: Engine, job: StageShapes, machine: Machine) -> MemoryPlan:
    """Predict, try, and scale."""
    found = choose(job)
    if found is None:
        least = smallest(job)
        raise ResourceError(
            f"the stage does not fit: even micro-batches of {least.forest_tokens:,} tokens with gradient "
            f"checkpointing {least.gradient_checkpointing} need more than {job.target.limit_bytes / GIB:.2f} GiB",
            where=f"stage {job.stage.name}",
            remedy="`tunesmith check` prints every part of the sum, and recipe lines that fit.",
        )
    setting, prediction = found
    low, high = replace(setting, forest_tokens=min(job.longest_tokens, setting.forest_tokens)), setting
    measured: int | None = None
    limit = job.target.limit_bytes
    while True:
        measured = trial(engine, job, high, machine)
        if measured is not None and measured <= limit:
            break
        if high.forest_tokens <= max(low.forest_tokens, SMALLEST_TRIAL) or job.stage.forest_tokens:
            raise ResourceError(
                f"the trial on the longest rows did not fit into {limit / GIB:.2f} GiB",
                where=f"stage {job.stage.name}",
                remedy="`tunesmith check` proposes recipe lines that fit.",
            )
        least_bytes = trial(engine, job, low, machine) if measured is not None else None
        half = max(low.forest_tokens, high.forest_tokens // 2)
        if least_bytes is not None and measured is not None and least_bytes <= limit:
            half = min(half, scaled(low, least_bytes, high, measured, limit))
        high = replace(high, forest_tokens=max(half, low.forest_tokens))
    return MemoryPlan(
        high.forest_tokens, high.gradient_checkpointing, high.offload, prediction.peak_bytes, measured, limit
    )


def trial(engine: Engine, job: StageShapes, setting: Setting, machine: Machine) -> int | None:
    """Peak of a forward and backward on the longest rows, with what moments will add and on a card its context; None
    where it ran out of memory. No weight, gradient or random state is changed."""
    trees = longest_trees(job.trees, setting.forest_tokens, job.examples_per_step)
    trained = [parameter for parameter in engine.model.parameters() if parameter.requires_grad]
    wants = objective_of(job.stage).wants
    modes = training_mode(
        engine.model,
        dropout=dropout_of(job.stage),
        gradient_checkpointing=setting.gradient_checkpointing,
        offload=setting.offload,
    )
    forget_peak(machine.device)
    try:
        with machine.seeded("memory trial"), modes:
            total = engine.logprobs(trees, wants).stacked(wants).sum()
            torch.autograd.grad(total, trained, allow_unused=True)
    except RuntimeError as problem:  # torch.OutOfMemoryError is one
        if not is_out_of_memory(problem):
            raise
        gc.collect()
        return None
    weights = weight_bytes(engine.model)
    moments = moments_bytes(job.stage.optimizer, weights, job.target.kind)
    context = job.target.floor_bytes if machine.device.type == "cuda" else 0  # a CPU's peak is of the whole process
    return context + highest_bytes(machine.device) + moments
