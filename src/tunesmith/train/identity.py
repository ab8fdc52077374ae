"""What a stage is known by: a checkpoint goes on only in the stage that made it.

In: the recipe's stage, its trees, its weights' names. Out: plain values that a checkpoint keeps and a resume compares.
Must not know: files, models' insides.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch

from tunesmith.data.store import digest_of
from tunesmith.data.types import Tree
from tunesmith.recipe.later import settings_of
from tunesmith.recipe.models import SftStage, StageBase
from tunesmith.train.checkpoint import Identity
from tunesmith.train.optim import Trainable
from tunesmith.train.step import Batch

StageRecipe = StageBase

_FREE = {
    # cadence and memory: they change no weight beyond rounding
    *(
        "eval_every",
        "samples",
        "save_every",
        "keep_checkpoints",
        "keep",
        "patience",
        "min_improvement",
        "forest_tokens",
        "gradient_checkpointing",
    ),
    *("offload_activations", "on_nonfinite", "max_nonfinite", "on_diagnosis", "kl_budget"),
    # more steps may be asked for; the loop compares them itself
    *("epochs", "max_steps"),
    # the rows themselves are compared, wherever they lie
    *("train", "heldout", "heldout_fraction", "replay", "max_length"),
}


def stage_identity(
    stage: StageRecipe,
    *,
    seed: int,
    train: Sequence[Tree],
    heldout: Sequence[Tree],
    replay: Sequence[Tree],
    trainable: Trainable,
    inputs: Mapping[str, str],
    autocast: torch.dtype | None = None,
) -> Identity:
    """Every setting that shapes the result, the rows and weights by hash; `inputs` are the caller's (base)."""
    settings = settings_of(stage, without=_FREE)
    shapes = [f"{name}{list(parameter.shape)}" for name, parameter in trainable.items()]
    per_step = stage.replay.examples_per_step if isinstance(stage, SftStage) and stage.replay else 0
    return {
        **{f"stage.{name}": value for name, value in settings.items()},
        **{f"input.{name}": value for name, value in inputs.items()},
        **({} if autocast is None else {"precision": str(autocast).removeprefix("torch.")}),
        "seed": seed,
        "replay.examples_per_step": per_step,
        "rows.train": _rows(train),
        "rows.heldout": _rows(heldout),
        "rows.replay": _rows(replay),
        "trained tensors": f"{len(shapes)}, sha256 {_sha(shapes)}",
    }


def reference_mean(batch: Batch) -> float | None:
    """Mean log-prob of the reference over all trained tokens, in nats; None where the method has no reference."""
    if batch.references is None:
        return None
    count = sum(len(reference) for reference in batch.references)
    return sum(float(reference.sum(dtype="float64")) for reference in batch.references) / max(1, count)


def _rows(trees: Sequence[Tree]) -> str:
    return f"{len(trees)}, sha256 {digest_of(trees)[:16]}"


def _sha(texts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]
