"""What a stage that goes on computes with: what it computed with before, wherever the recipe leaves it open.

In: the run's folder, what the recipe asks. Out: torch's threads set; an engine of the checkpoint's kernel; the stage
with the checkpoint's micro-batches. Must not know: steps, tensors.

Threads, kernel and micro-batches decide in which order sums are rounded. A run that was broken off on four cores and
goes on on eight would end with other bits; so it takes four again where it can, and says so where it cannot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from tunesmith.data.types import Tree
from tunesmith.engine.backends import Attention
from tunesmith.engine.engine import Engine
from tunesmith.engine.parity import ParityReport, checked_engine
from tunesmith.errors import ModelError
from tunesmith.model.machine import num_cores
from tunesmith.pipeline.memory import FILE
from tunesmith.recipe.models import Stage
from tunesmith.runs.folder import RunFolder, StageFolder
from tunesmith.runs.inventory import read_object
from tunesmith.train.checkpoint import peek_state

THREADS = "threads"
"""The entry of the run's manifest that tells on how many threads the run began."""


def settle_threads(run: RunFolder, stage: str, *, asked: int, tell: Callable[[str], None]) -> None:
    """Set torch's threads for a stage: those that the recipe asks for, else those of its checkpoint, else the run's.

    Where this machine has fewer cores it takes what there is, and says that rounding can differ.
    """
    kept = run.read_manifest().get(THREADS)
    if type(kept) is not int or kept < 1:
        kept = torch.get_num_threads()
        run.update_manifest({THREADS: kept})
    saved = peek_state(run.stage(stage).checkpoints)
    wanted, cores = kept if saved is None else saved.threads, num_cores()
    if asked or wanted == torch.get_num_threads():
        return
    if 1 <= wanted <= cores:
        tell(f"stage {stage}: it goes on with {wanted} threads, as it began; this machine has {cores} cores")
        torch.set_num_threads(wanted)
    else:
        tell(f"stage {stage}: it began on {wanted} threads, and this machine has {cores} cores: rounding can differ")


def engine_as_before(
    model: PreTrainedModel,
    trees: Sequence[Tree],
    *,
    attention: Attention,
    autocast: torch.dtype | None,
    folder: StageFolder,
    tell: Callable[[str], None],
) -> tuple[Engine, ParityReport]:
    """The checked engine; with `attention: auto` the one of the stage's checkpoint where it is right here.

    Raises ModelError where the recipe names a kernel that cannot be used.
    """
    saved = peek_state(folder.checkpoints) if attention == "auto" else None
    known: dict[str, Attention] = {"varlen": "varlen", "flex": "flex", "sdpa": "sdpa", "plain": "plain"}
    before = None if saved is None or saved.attention is None else known.get(saved.attention)
    if before is not None:
        try:
            return checked_engine(model, trees, attention=before, autocast=autocast)
        except ModelError as error:
            tell(f"the stage was computed with attention {before}, and here it cannot be: {error.what}")
    return checked_engine(model, trees, attention=attention, autocast=autocast)


def stage_as_before(stage: Stage, folder: StageFolder) -> Stage:
    """The stage with its checkpoint's micro-batches, where the folder's plan of memory is lost and the recipe leaves
    them open; a new plan could find others."""
    saved = peek_state(folder.checkpoints)
    if saved is None or saved.asked_tokens is None or _is_readable(folder.path / FILE):
        return stage
    update = {
        "forest_tokens": stage.forest_tokens or saved.asked_tokens,
        "gradient_checkpointing": stage.gradient_checkpointing or saved.checkpointing,
    }
    return stage.model_copy(update=update)


def _is_readable(path: Path) -> bool:
    try:
        read_object(path)
    except (OSError, ValueError):
        return False
    return True
