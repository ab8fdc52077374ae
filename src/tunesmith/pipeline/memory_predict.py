"""How much memory a stage will take, from shapes, before a weight is loaded.

In: a stage, the model's shapes, the lengths of its rows, the device it is for. Out: the peak, every part of the sum
named. Must not know: what is then chosen, files of a run, how a table looks.

The sum: what lies there all the time (process, weights, adapter, gradients, moments, rows) and the peak of what one
micro-batch makes, which is traced (`engine/trace.py`), not estimated. Deep models are traced with a few of their
layers: the peak is a straight line in their number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.modeling_layers import GradientCheckpointingLayer

from tunesmith.data.store import sizes_of
from tunesmith.data.types import Tree
from tunesmith.engine import cpu_flash
from tunesmith.engine.attention import ordinary_attention
from tunesmith.engine.engine import Engine
from tunesmith.engine.logprobs import CHUNK_BYTES
from tunesmith.engine.plain import branch_logprobs
from tunesmith.engine.trace import Traced, moved_away, shapes_mode, shapes_of_trees, take_shapes, tiled_as, trace
from tunesmith.model.machine import FOREST_TOKENS
from tunesmith.model.shapes import Shapes, WeightBytes
from tunesmith.recipe.models import Full, Lora, SftStage, Stage
from tunesmith.recipe.preferences import PreferenceStage, reference_update_of, samples_of
from tunesmith.train.activations import SMALL_BYTES
from tunesmith.train.modes import Checkpointing, Dropout, eval_mode, training_mode

GIB = 2**30
POLICIES: tuple[Checkpointing, ...] = ("none", "selective", "full")

CUDA_CONTEXT_BYTES = GIB // 2
"""What a CUDA process holds beside the allocator's memory: kernels and handles; 0.4 to 0.6 GiB on recent cards."""
FIRST_STEP_BYTES = 140 * 2**20
"""What a CPU process grows by when it first computes: code of the libraries that is read in, their threads' buffers."""
SLACK = 0.03
"""Of everything that a micro-batch makes: what the allocator cannot fit into its gaps, and kernels' own buffers."""
TRACED_WHOLE = 8
"""Layers up to which a model is traced as it is."""


@dataclass(frozen=True, slots=True)
class Target:
    """The device that is planned for. `floor_bytes`: what the process holds before a model is there."""

    kind: Literal["cpu", "cuda"]
    dtype: torch.dtype
    limit_bytes: int
    floor_bytes: int

    @property
    def autocast(self) -> torch.dtype | None:
        """What the engine's autocast is."""
        return None if self.dtype == torch.float32 else self.dtype

    @property
    def useful_tokens(self) -> int:
        """Tokens of a micro-batch above which a larger one brings nothing."""
        return FOREST_TOKENS[self.kind]


@dataclass(frozen=True, slots=True)
class Setting:
    """What of a stage decides its memory and may be chosen."""

    forest_tokens: int
    gradient_checkpointing: Checkpointing
    offload: bool = False


@dataclass(frozen=True, slots=True)
class Prediction:
    """The peak of a stage in bytes: by part in its highest phase, and of every phase."""

    parts: Mapping[str, int]
    phases: Mapping[str, int]

    @property
    def peak_bytes(self) -> int:
        """The highest phase."""
        return max(self.phases.values())

    @property
    def highest(self) -> str:
        """The phase that decides."""
        return max(self.phases, key=lambda name: self.phases[name])


@dataclass(frozen=True, slots=True, eq=False)
class StageShapes:
    """A stage as memory sees it; `trees` are all of its rows."""

    stage: Stage
    shapes: Shapes
    trees: Sequence[Tree]
    target: Target
    mode: FakeTensorMode = field(default_factory=shapes_mode)
    traced: dict[tuple[object, ...], Traced] = field(default_factory=dict)

    @property
    def longest_tokens(self) -> int:
        """Tokens of the longest tree: no micro-batch can be smaller than the tree that is in it."""
        return int(sizes_of(self.trees).num_tokens.max())

    @property
    def step_tokens(self) -> int:
        """Tokens of the largest step that could be drawn: no micro-batch is larger."""
        sizes = np.sort(sizes_of(self.trees).num_tokens)
        return int(sizes[-self.examples_per_step :].sum())

    @property
    def examples_per_step(self) -> int:
        """Examples of a step, replayed ones among them."""
        replay = self.stage.replay if isinstance(self.stage, SftStage) else None
        return self.stage.batch_size + (replay.examples_per_step if replay else 0)


def predict(job: StageShapes, setting: Setting) -> Prediction:
    """Peak memory of a stage under a setting."""
    weights, target = job.shapes.weights, job.target
    tokens = min(max(setting.forest_tokens, job.longest_tokens), job.step_tokens)
    for dtype in {torch.float32, target.dtype}:
        cpu_flash.works(dtype)  # it asks once, and needs values
    with _on_shapes(job):
        pass  # all of its layers, before some are left out
    step = _step_peak(job, setting, tokens)
    several = job.step_tokens > tokens
    gradients, is_full = 4 * weights.num_trained, isinstance(job.stage.tuning, Full)
    always = {
        "process": target.floor_bytes + (FIRST_STEP_BYTES if target.kind == "cpu" else 0),
        "weights": weights.frozen + (weights.trained if is_full else 0),
        "adapter": 0 if is_full else weights.trained,
        "weights kept aside": _kept_aside(job.stage, weights.num_trained, target.kind),
        "rows": _rows_bytes(job.trees) if target.kind == "cpu" else 0,
    }
    moments = moments_bytes(job.stage.optimizer, weights, target.kind)
    in_step = {
        "gradients": gradients if several else 0,
        "optimizer": moments,
        "activations": step.peak_bytes - step.logits_bytes,
        "logits": step.logits_bytes,
        "dequantized": weights.dequantized,
        "slack": int(SLACK * step.peak_bytes),
    }
    check = _parity_peak(job)
    in_check = {"logits": check.logits_bytes, "activations": check.peak_bytes - check.logits_bytes}
    moved = 4 * weights.num_trained if reference_update_of(job.stage) else 0  # the old one beside the new one
    in_update = {"gradients": gradients, "optimizer": moments, "moved reference": moved}
    by_phase = {"step": always | in_step, "update": always | in_update, "parity check": always | in_check}
    phases = {name: sum(parts.values()) for name, parts in by_phase.items()}
    highest = max(phases, key=lambda name: phases[name])
    return Prediction({name: size for name, size in by_phase[highest].items() if size}, phases)


def _kept_aside(stage: Stage, num_trained: int, device: str) -> int:
    """Trained weights held a second time: of a live reference, and in the host's memory those that answers are compared
    with."""
    live = reference_update_of(stage) is not None
    start = device == "cpu" and samples_of(stage).num_prompts > 0
    return 4 * num_trained * (live + start)


def moments_bytes(kind: str, weights: WeightBytes, device: str) -> int:
    """State of an optimizer: lion one number a weight, adafactor one a row and column, muon one for matrices inside
    the model and two for the rest, the others as `optimizer_bytes` says."""
    total = 0
    for each in weights.shapes:
        size, is_matrix = math.prod(each.shape), len(each.shape) >= 2
        if kind == "adafactor":
            total += 4 * (size // each.shape[-1] + size // each.shape[-2] if is_matrix else size)
        elif kind == "lion" or (kind == "muon" and is_matrix and not each.is_table):
            total += 4 * size
        else:
            total += optimizer_bytes(kind, (size,), device)
    return total


def optimizer_bytes(kind: str, sizes: Sequence[int], device: str) -> int:
    """Both moments: float32; or 8 bits with a float32 scale for every 256, for tensors of 4,096 numbers and more.

    Paged moments lie in the host's memory as soon as a card is full, so they are not counted there.
    """
    if kind.startswith("paged") and device == "cuda":
        return 0
    if not kind.endswith("8bit"):
        return 8 * sum(sizes)
    return sum(2 * (size + 4 * -(-size // 256)) if size >= 4096 else 8 * size for size in sizes)


def _rows_bytes(trees: Sequence[Tree]) -> int:
    """Ids and masks of all rows: they are mapped from disk, and all of them are read once an epoch."""
    return 5 * int(sizes_of(trees).num_unshared.sum())


def longest_trees(trees: Sequence[Tree], tokens: int, most: int) -> list[Tree]:
    """The longest trees that fit `tokens` together, at least one and at most `most`."""
    sizes = sizes_of(trees).num_tokens
    picked: list[Tree] = []
    total = 0
    for number in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[number])
        if picked and total + size > tokens:
            continue
        picked.append(trees[number])
        total += size
        if len(picked) == most or total >= tokens:
            break
    return picked


def _step_peak(job: StageShapes, setting: Setting, tokens: int) -> Traced:
    """Peak of one forward and backward of `tokens` tokens of the longest rows."""
    trees = longest_trees(job.trees, tokens, job.examples_per_step)
    several = job.step_tokens > tokens
    layers = [module for module in job.shapes.model.modules() if isinstance(module, nn.ModuleList)]
    stack = next((each for each in layers if len(each) and isinstance(each[0], GradientCheckpointingLayer)), None)
    if stack is None or len(stack) <= TRACED_WHOLE:
        return _trace_step(job, setting, trees, several=several)
    short = _period(job)
    with _first_layers(stack, short):
        low = _trace_step(job, setting, trees, several=several)
    with _first_layers(stack, 2 * short):
        high = _trace_step(job, setting, trees, several=several)
    rest = (len(stack) - 2 * short) / short
    peak = high.peak_bytes + int(rest * (high.peak_bytes - low.peak_bytes))
    return Traced(peak, min(high.logits_bytes, peak))


def _period(job: StageShapes) -> int:
    """Layers after which a model repeats itself; 2 where all are alike."""
    kinds = job.shapes.model.config.get_text_config().to_dict().get("layer_types")
    if not isinstance(kinds, list):
        return 2
    fits = (size for size in range(1, len(kinds)) if all(kinds[i] == kinds[i % size] for i in range(len(kinds))))
    return max(2, min(next(fits, 2), len(kinds) // 2))


@contextmanager
def _first_layers(stack: nn.ModuleList, count: int) -> Iterator[None]:
    """Only the first layers inside."""
    kept = dict(stack._modules)
    try:
        for name in list(kept)[count:]:
            del stack._modules[name]
        yield
    finally:
        stack._modules.clear()
        stack._modules.update(kept)


def _trace_step(job: StageShapes, setting: Setting, trees: Sequence[Tree], *, several: bool) -> Traced:
    model = job.shapes.model
    policy = (setting.gradient_checkpointing, setting.offload)
    lengths = tuple((len(tree.prompt_ids), *(len(branch.ids) for branch in tree.branches)) for tree in trees)
    key = (policy, several, sum(1 for _ in model.modules()), lengths)
    if key in job.traced:
        return job.traced[key]
    chunk_bytes = None if job.target.kind == "cpu" else CHUNK_BYTES[job.target.kind]
    engine = Engine(model, chunk_bytes=chunk_bytes, autocast=job.target.autocast)
    vocabulary = model.config.get_text_config().vocab_size

    def run() -> None:
        engine.logprobs(shapes_of_trees(trees)).logprob_N.sum().backward()

    modes = training_mode(model, dropout=dropout_of(job.stage), gradient_checkpointing=setting.gradient_checkpointing)
    offloads = setting.offload and job.target.kind == "cuda"
    away = moved_away(model, SMALL_BYTES) if offloads else nullcontext()
    with _on_shapes(job), modes, tiled_as(job.target.kind), away:
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if several and parameter.requires_grad else None
        found = trace(run, model, vocabulary=vocabulary)
        for parameter in model.parameters():
            parameter.grad = None
    if offloads and setting.gradient_checkpointing != "none":
        found = replace(found, peak_bytes=max(found.logits_bytes, found.peak_bytes - _inputs_away(job, trees)))
    job.traced[key] = found
    return found


def _inputs_away(job: StageShapes, trees: Sequence[Tree]) -> int:
    """Bytes of the recomputed layers' inputs that wait in the host's memory: all of them but one.

    By rule, not traced: checkpointing holds a region's inputs itself, where no hook sees them.
    """
    model = job.shapes.model
    hidden = int(model.config.get_text_config().to_dict().get("hidden_size") or 0)
    one = int(sizes_of(trees).num_tokens.sum()) * hidden * (job.target.autocast or torch.float32).itemsize
    layers = sum(isinstance(module, GradientCheckpointingLayer) for module in model.modules())
    return (layers - 1) * one if one >= SMALL_BYTES and layers else 0


def _parity_peak(job: StageShapes) -> Traced:
    """Peak of the plain forward of the longest row, with which a run begins: all of its trained tokens' logits at once.

    The check's gradients, of rows cut to a few tokens, are not counted: a step holds more.
    """
    sizes = sizes_of(job.trees)
    (tree,) = shapes_of_trees([job.trees[int(sizes.longest_row.argmax())]])
    branch = max(tree.branches, key=lambda each: len(each.ids))
    key = ("parity", len(tree.prompt_ids), len(branch.ids), int(branch.trained.sum()))
    model = job.shapes.model
    if key not in job.traced:
        with _on_shapes(job), torch.no_grad(), eval_mode(model), ordinary_attention(model):
            vocabulary = model.config.get_text_config().vocab_size
            job.traced[key] = trace(
                lambda: branch_logprobs(model, tree.prompt_ids, branch), model, vocabulary=vocabulary
            )
    return job.traced[key]


@contextmanager
def _on_shapes(job: StageShapes) -> Iterator[None]:
    """Tensors without values, the model's among them."""
    with job.mode:
        if next(job.shapes.model.parameters()).device.type == "meta":
            take_shapes(job.shapes.model)
        yield


def dropout_of(stage: Stage) -> Dropout:
    """Which dropouts the stage trains with, as the loop decides it."""
    if not isinstance(stage, PreferenceStage):
        return "model"
    return "adapter" if isinstance(stage.tuning, Lora) and stage.tuning.dropout > 0 else "off"
