"""NEFTune: uniform noise on the embeddings of the rows that a step trains.

In: the embeddings of a forest's tokens, its trees, and the step's key. Out: the embeddings with noise.
Must not know: objectives, files.

Jain et al. 2023 (arXiv:2310.05914), algorithm 1: x + alpha / sqrt(L d) * u with u uniform on (-1, 1), L the row's
tokens and d the width. L is the row's own length: rows are not padded here (the paper's code leaves padding out, too).
The noise of a row is drawn by (seed, stage, step, row), so that micro-batches, ranks and resumes cannot change it.

Shapes: T tokens of a forest, H hidden size.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tunesmith.data.types import Tree
from tunesmith.engine.engine import Engine
from tunesmith.recipe.stages import StageBase, SupervisedStage


@dataclass(frozen=True, slots=True)
class Noise:
    """The noise of one step. key: seed, stage and step in words; alpha: its strength, 5 is usual."""

    key: str
    alpha: float

    def __call__(self, embedded_TH: Tensor, trees: Sequence[Tree]) -> Tensor:
        """The embeddings of a forest of these trees, with noise, [T, H]; a constant to the backward pass."""
        parts = [self.of(tree, embedded_TH.shape[-1], embedded_TH.device) for tree in trees]
        return embedded_TH + torch.cat(parts).to(embedded_TH.dtype)

    def of(self, tree: Tree, width: int, device: torch.device) -> Tensor:
        """The noise of one tree's tokens, the prompt's first, [tree.num_tokens, width], float32."""
        digest = hashlib.sha256(f"{self.key}/noise/{tree.id}".encode()).digest()
        generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        uniform_TH = torch.rand(tree.num_tokens, width, generator=generator, device=device)
        return (2 * uniform_TH - 1) * (self.alpha / math.sqrt(tree.num_tokens * width))


def noisy(engine: Engine, stage: StageBase, *, key: str) -> Engine:
    """The engine with the noise of one step; the same engine where the stage trains without."""
    alpha = stage.neftune_alpha if isinstance(stage, SupervisedStage) else 0.0
    return replace(engine, noise=Noise(key, alpha)) if alpha else engine
