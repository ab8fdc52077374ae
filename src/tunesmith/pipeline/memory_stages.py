"""The forecast of a recipe: for each stage the device, the settings that fit, memory, time and disk.

In: a recipe, its prepared rows, the machine, or the memory of a card that is not there. Out: a forecast a stage, and
the recipe lines that would make it fit. Nothing is loaded. Must not know: how it is printed.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import torch

from tunesmith.data.plan import num_steps
from tunesmith.data.prepare import Prepared
from tunesmith.data.store import Joined, sizes_of
from tunesmith.data.types import Tree
from tunesmith.errors import ModelError
from tunesmith.model.load import DTYPES, forward_dtype
from tunesmith.model.machine import Machine
from tunesmith.model.memory import process_floor, usable_bytes
from tunesmith.model.shapes import WeightBytes, shapes_for_training
from tunesmith.objectives import objective_of
from tunesmith.pipeline.memory_predict import (
    CUDA_CONTEXT_BYTES,
    POLICIES,
    Prediction,
    Setting,
    StageShapes,
    Target,
    moments_bytes,
    predict,
)
from tunesmith.pipeline.prepare import PreparedRun
from tunesmith.recipe.models import Full, Model, Recipe, Stage
from tunesmith.recipe.preferences import reference_update_of

UNITS = {"GB": 10**9, "GiB": 2**30}
KEPT_FREE = 0.1
"""Of a device's free memory that `memory: auto` leaves to others, and to what a prediction may miss."""
SHARE_OF_RATE = 0.45
"""Of the rate of large products that training reaches: between the 40 % that a prototype reached on a CPU and the 50 %
that is asked of this engine. No machine's own: the time printed is an estimate."""
GEMM_SIZE = 1024
GEMM_SECONDS = 0.5
LOWEST_SHARE = 4
"""Micro-batches are made smaller, down to a fourth of the useful size, before anything is computed twice."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a stage will take. `fitting`: whether it fits; `seconds`: None where the device's rate is not known.

    `changes`: recipe lines, by key, that differ from the recipe; empty where it fits as it is.
    """

    stage: str
    target: Target
    setting: Setting
    prediction: Prediction | None
    fitting: bool
    seconds: float | None
    disk_bytes: int
    changes: tuple[tuple[str, str], ...] = ()
    note: str = ""


def memory_limit(memory: str) -> int | None:
    """Bytes of a size such as `16GB` (10^9 bytes each) or `16GiB` (2^30); None for auto and fixed."""
    found = re.fullmatch(r"([0-9.]+)(GB|GiB)", memory)
    return int(float(found[1]) * UNITS[found[2]]) if found else None


def target_here(recipe_memory: str, model: Model, machine: Machine) -> Target:
    """The device of this machine, and what of it may be used."""
    limit = memory_limit(recipe_memory)
    kind: Literal["cpu", "cuda"] = "cuda" if machine.device.type == "cuda" else "cpu"
    floor = CUDA_CONTEXT_BYTES if kind == "cuda" else process_floor()
    usable = int(usable_bytes(machine.device) * (1 - KEPT_FREE))
    return Target(kind, forward_dtype(model, machine.device), limit or usable, floor)


def target_elsewhere(memory_bytes: int, model: Model, *, bf16: bool) -> Target:
    """A card that is not there."""
    dtype = DTYPES[model.dtype] if model.dtype != "auto" else torch.bfloat16 if bf16 else torch.float16
    return Target("cuda", dtype, memory_bytes, CUDA_CONTEXT_BYTES)


def predict_stages(
    recipe: Recipe, prepared: PreparedRun, machine: Machine, *, gpu_bytes: int | None = None, bf16: bool = True
) -> list[Forecast]:
    """A forecast for every stage, on this machine or, with `gpu_bytes`, on a card of so much memory."""
    forecasts: list[Forecast] = []
    for stage in recipe.stages:
        if gpu_bytes is None:
            target = target_here(recipe.memory, recipe.model, machine)
        else:
            target = target_elsewhere(gpu_bytes, recipe.model, bf16=bf16)
        forecasts.append(_forecast(recipe, stage, prepared.stages[stage.name], target, here=gpu_bytes is None))
    return forecasts


def _forecast(recipe: Recipe, stage: Stage, rows: Prepared, target: Target, *, here: bool) -> Forecast:
    shapes = shapes_for_training(recipe.model, stage.tuning, dtype=target.dtype, scores=not stage.makes_policy)
    job = StageShapes(stage, shapes, Joined(rows.train, rows.heldout, rows.replay), target)
    disk = disk_bytes(stage, shapes.weights)
    rate = gemm_rate() if here and target.kind == "cpu" else None
    tokens, policy = stage.forest_tokens or target.useful_tokens, stage.gradient_checkpointing or "none"
    setting = Setting(tokens, policy, stage.offload_activations)
    try:
        if recipe.memory == "fixed":
            prediction = predict(job, setting)
            found = (setting, prediction) if prediction.peak_bytes <= target.limit_bytes else None
        else:
            found = choose(job)
            prediction = found[1] if found else predict(job, smallest(job))
    except RuntimeError as problem:  # what a model does depends on its values: experts that are chosen
        note = f"not predicted: {str(problem).splitlines()[0][:100]}"
        return Forecast(stage.name, target, setting, None, True, None, disk, note=note)
    setting = found[0] if found else setting if recipe.memory == "fixed" else smallest(job)
    seconds = None if rate is None else stage_seconds(job, setting, rate, len(rows.train))
    forecast = Forecast(stage.name, target, setting, prediction, found is not None, seconds, disk)
    return forecast if found else replace(forecast, changes=proposal(recipe, job))


def smallest(job: StageShapes) -> Setting:
    """The setting of the least memory that the stage leaves open."""
    tokens = job.stage.forest_tokens or job.longest_tokens
    return Setting(tokens, job.stage.gradient_checkpointing or "full", job.stage.offload_activations)


def settings(job: StageShapes) -> Iterator[Setting]:
    """What may be chosen for a stage, the fastest first."""
    stage = job.stage
    policies = POLICIES if stage.gradient_checkpointing is None else (stage.gradient_checkpointing,)
    useful = stage.forest_tokens or job.target.useful_tokens
    low = useful if stage.forest_tokens else max(min(job.longest_tokens, useful), useful // LOWEST_SHARE)
    for policy in policies:
        for tokens in dict.fromkeys((useful, low)):
            yield Setting(tokens, policy, stage.offload_activations)
    if not stage.forest_tokens and job.longest_tokens < low:
        yield Setting(job.longest_tokens, policies[-1], stage.offload_activations)


def choose(job: StageShapes) -> tuple[Setting, Prediction] | None:
    """The first setting that fits the target, its micro-batch as large as fits; None where none does."""
    limit = job.target.limit_bytes
    above: tuple[Setting, Prediction] | None = None
    for setting in settings(job):
        found = predict(job, setting)
        if found.peak_bytes > limit:
            if above is None and predict(job, smallest(job)).peak_bytes > limit:
                return None  # then nothing between fits either
            above = (setting, found)
            continue
        if above is None or above[0].gradient_checkpointing != setting.gradient_checkpointing:
            return setting, found
        between = replace(
            setting, forest_tokens=scaled(setting, found.peak_bytes, above[0], above[1].peak_bytes, limit)
        )
        tried = predict(job, between)
        return (between, tried) if tried.peak_bytes <= limit else (setting, found)
    return None


def scaled(low: Setting, low_bytes: int, high: Setting, high_bytes: int, limit: int) -> int:
    """Tokens at which the straight line through two measurements meets the limit, in steps of 64."""
    share = (limit - low_bytes) / max(1, high_bytes - low_bytes)
    tokens = low.forest_tokens + share * (high.forest_tokens - low.forest_tokens)
    return max(low.forest_tokens, min(high.forest_tokens, int(tokens) // 64 * 64))


def proposal(recipe: Recipe, job: StageShapes) -> tuple[tuple[str, str], ...]:
    """Recipe lines that make a stage fit, in the order of what they cost; empty where nothing does."""
    stage, model = job.stage, recipe.model
    changes: list[tuple[str, str]] = []
    longest = job.longest_tokens
    tried = stage.model_copy(update={"forest_tokens": longest})
    steps: list[tuple[str, str]] = [
        (f"stages.{stage.name}.forest_tokens", str(longest)),
        *((f"stages.{stage.name}.gradient_checkpointing", policy) for policy in ("selective", "full")),
    ]
    if job.target.kind == "cuda" and not stage.offload_activations:
        steps.append((f"stages.{stage.name}.offload_activations", "true"))
    if not isinstance(stage.tuning, Full) and model.quantization == "none":
        steps.append(("model.quantization", "nf4"))
    if stage.optimizer == "adamw":
        steps.append((f"stages.{stage.name}.optimizer", "adamw_8bit"))
    rungs: list[tuple[Model, Stage, tuple[tuple[str, str], ...]]] = []
    for key, value in steps:
        field = key.rsplit(".", 1)[1]
        changes = [change for change in changes if change[0] != key] + [(key, value)]
        if key == "model.quantization":
            model = model.model_copy(update={field: value})
        else:
            update: dict[str, object] = {field: int(value) if value.isdigit() else value == "true" or value}
            tried = tried.model_copy(update=update)
        rungs.append((model, tried, tuple(changes)))
    if _fits(model, tried, job):  # the highest rung first: where it does not fit, none does
        return next(shown for model, tried, shown in rungs if _fits(model, tried, job))
    length = _length_that_fits(model, tried, job)
    return (*changes, (f"stages.{stage.name}.max_length", str(length))) if length else ()


def _fits(model: Model, stage: Stage, job: StageShapes, trees: Sequence[Tree] | None = None) -> bool:
    shapes = shapes_for_training(model, stage.tuning, dtype=job.target.dtype, scores=not stage.makes_policy)
    tried = StageShapes(stage, shapes, job.trees if trees is None else trees, job.target)
    tokens = stage.forest_tokens or tried.longest_tokens
    setting = Setting(tokens, stage.gradient_checkpointing or "none", stage.offload_activations)
    return predict(tried, setting).peak_bytes <= job.target.limit_bytes


def _length_that_fits(model: Model, stage: Stage, job: StageShapes) -> int:
    """The longest row, of halves of the longest there is, with which the stage fits; 0 where none does."""
    sizes = sizes_of(job.trees)
    length = int(sizes.longest_row.max()) // 2
    while length >= 64:
        kept = [job.trees[number] for number in range(len(job.trees)) if sizes.longest_row[number] <= length]
        short = stage.model_copy(update={"forest_tokens": None})
        if kept and _fits(model, short, job, kept):
            return length
        length //= 2
    return 0


def disk_bytes(stage: Stage, trained: WeightBytes) -> int:
    """Bytes of a stage's checkpoints (those kept, one in the making, the best) and its result, in float32."""
    weights = 4 * trained.num_trained
    moments = moments_bytes(stage.optimizer, trained, "cpu")
    reference = weights if reference_update_of(stage) else 0
    return (stage.keep_checkpoints + 2) * (weights + moments + reference) + weights


def stage_seconds(job: StageShapes, setting: Setting, rate: float, num_train: int) -> float:
    """Seconds of a stage: its arithmetic over what this machine reaches of its rate of large products.

    A distinct token costs 2 operations a weight forward and 2 backward to the inputs, 2 more for a trained weight's
    gradient, and attention; recomputed layers and the reference's pass cost a forward each.
    """
    weights, config = job.shapes.weights, job.shapes.model.config.get_text_config().to_dict()
    embedding = job.shapes.model.get_input_embeddings()
    table = sum(parameter.numel() for parameter in embedding.parameters())
    head = job.shapes.model.get_output_embeddings()
    head_size = 0 if head is None else sum(parameter.numel() for parameter in head.parameters())
    inside = max(0, weights.num_frozen + weights.num_trained - table - (head_size if head_size != table else 0))
    trained = inside if isinstance(job.stage.tuning, Full) else weights.num_trained
    forwards = 1 + (setting.gradient_checkpointing == "full")
    forwards += 1 if objective_of(job.stage).needs_reference else 0
    forwards += 1 if reference_update_of(job.stage) else 0
    sizes = sizes_of(job.trees)
    tokens, read = float(sizes.num_tokens.mean()), float(sizes.num_trained.mean())
    hidden, layers = int(config.get("hidden_size") or 0), int(config.get("num_hidden_layers") or 0)
    pairs = float(sizes.num_pairs.mean())
    one_tree = tokens * ((2 * forwards + 2) * inside + 2 * trained) + read * 4 * head_size
    one_tree += (4 * forwards + 8) * pairs * hidden * layers
    steps = num_steps(num_train, job.stage.batch_size, job.stage.epochs)
    steps = min(steps, job.stage.max_steps or steps)
    return steps * job.examples_per_step * one_tree / (rate * SHARE_OF_RATE)


@lru_cache(maxsize=1)
def gemm_rate() -> float:
    """Floating-point operations a second of large float32 products here, over half a second."""
    left, right = torch.randn(GEMM_SIZE, GEMM_SIZE), torch.randn(GEMM_SIZE, GEMM_SIZE)
    best = math.inf
    until = time.monotonic() + GEMM_SECONDS
    while time.monotonic() < until:
        start = time.monotonic()
        torch.mm(left, right)
        best = min(best, time.monotonic() - start)
    return 2 * GEMM_SIZE**3 / best


__all__ = ["Forecast", "ModelError", "choose", "memory_limit", "predict_stages", "target_here"]
