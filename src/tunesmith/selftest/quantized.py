"""Proofs about quantized bases: a preference stage on one starts at its own reference, not at the unquantized one.

In: a device. Out: proofs, skipped where bitsandbytes is absent. Must not know: how weights are quantized.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from tunesmith.data.types import Tree
from tunesmith.engine.engine import Engine
from tunesmith.engine.scoring import score
from tunesmith.model.adapters import add_adapter, inner_model
from tunesmith.model.load import load_model, quiet_transformers
from tunesmith.model.machine import Machine
from tunesmith.objectives import dpo
from tunesmith.recipe.models import Lora, Model
from tunesmith.selftest.inputs import pair_trees, small_model
from tunesmith.selftest.proof import Proof, skipped
from tunesmith.train.step import Batch, accumulate

KINDS: tuple[Literal["nf4", "int8"], ...] = ("nf4", "int8")
LIMIT = 1e-5
"""Nats between the loss of the first step and ln 2, in float32."""


def quantized_proofs(device: torch.device) -> Iterator[Proof]:
    """The first DPO step on an NF4 and on an 8-bit base."""
    if find_spec("bitsandbytes") is None:
        for kind in KINDS:
            yield skipped(f"{kind} base", "bitsandbytes is not installed")
        return
    base = small_model("llama", device)
    trees = pair_trees()
    foreign = score(Engine(base), trees, forest_tokens=110)
    with tempfile.TemporaryDirectory(prefix="tunesmith-selftest-") as folder:
        with quiet_transformers():
            base.save_pretrained(folder)
        for kind in KINDS:
            yield _start_proof(kind, Path(folder), trees, foreign, device)


def _start_proof(
    kind: Literal["nf4", "int8"], folder: Path, trees: list[Tree], foreign: list[np.ndarray], device: torch.device
) -> Proof:
    """ln 2 with its own reference, taken in other forests than the step; and not with the unquantized model's."""
    settings = Model(path=str(folder), quantization=kind)
    quantized = load_model(settings, device=device, dtype=torch.float32)
    engine = Engine(inner_model(add_adapter(quantized, Lora(r=4), seed=0)))
    own = score(engine, trees, forest_tokens=110)
    losses = [_first_loss(engine, Batch(trees, references), device) for references in (own, foreign)]
    error = abs(losses[0] - math.log(2))
    if not abs(losses[1] - math.log(2)) > LIMIT:
        error = math.inf  # the base was not quantized, so nothing was shown
    return Proof(f"{kind} base", "first DPO loss against ln 2, own reference", error, LIMIT)


def _first_loss(engine: Engine, batch: Batch, device: torch.device) -> float:
    result = accumulate(engine, batch, objective=dpo(0.1), forest_tokens=60, machine=Machine(device))
    engine.model.zero_grad(set_to_none=True)
    return result.loss.mean()
