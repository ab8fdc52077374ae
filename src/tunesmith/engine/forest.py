"""Forests: whole trees laid end to end in one flat sequence, without padding.

In: trees of token ids. Out: the tensors of one micro-batch, and the spans that say which tokens are whose.
Must not know: models, objectives, files.

Shapes: T tokens of the forest, N trained tokens, R tokens before one of those, B branches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tunesmith.data.types import Tree


@dataclass(frozen=True, slots=True)
class TreeSpan:
    """Where a tree lies in the flat sequence: `prompt_len` tokens from `start`, then its branches in order."""

    start: int
    prompt_len: int
    branch_lens: tuple[int, ...]

    @property
    def stop(self) -> int:
        """One past the tree's last token."""
        return self.start + self.prompt_len + sum(self.branch_lens)

    def branch_starts(self) -> Iterator[tuple[int, int]]:
        """(first flat index, length) of every branch."""
        start = self.start + self.prompt_len
        for length in self.branch_lens:
            yield start, length
            start += length


@dataclass(frozen=True, slots=True, eq=False)
class Forest:
    """One micro-batch.

    input_ids_T, positions_T: int64; every branch continues its prompt's positions.
    source_N: flat index whose hidden state predicts the trained token (where scores are read: the token's own);
    target_N: that token's id.
    read_R: the flat indices in source_N, each once, rising (branches share the prompt's last token).
    branch_N: branch number of each trained token; tree_B: tree number of each branch (both count within the forest).
    """

    input_ids_T: Tensor
    positions_T: Tensor
    spans: tuple[TreeSpan, ...]
    source_N: Tensor
    target_N: Tensor
    read_R: Tensor
    branch_N: Tensor
    tree_B: Tensor

    @property
    def num_tokens(self) -> int:
        """T: the tokens that a forward pass computes."""
        return int(self.input_ids_T.numel())

    @property
    def num_trained(self) -> int:
        """N: the tokens that a loss reads."""
        return int(self.target_N.numel())


def build_forest(trees: Sequence[Tree], device: torch.device | str = "cpu", *, reads_own: bool = False) -> Forest:
    """Lay `trees` end to end. `reads_own`: what is read of a trained token is its own hidden state, not the one before.

    Trained tokens keep tree, branch and token order. The first token of a branch without a prompt has no
    token before it, so it can be no target, and is left out even where it is marked as trained.
    """
    ids: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    sources: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    branch_numbers: list[np.ndarray] = []
    tree_of_branch: list[int] = []
    spans: list[TreeSpan] = []
    start = 0
    for tree_number, tree in enumerate(trees):
        prompt_len = len(tree.prompt_ids)
        span = TreeSpan(start, prompt_len, tuple(len(branch.ids) for branch in tree.branches))
        spans.append(span)
        ids.append(tree.prompt_ids)
        positions.append(np.arange(prompt_len))
        for branch, (branch_start, length) in zip(tree.branches, span.branch_starts(), strict=True):
            ids.append(branch.ids)
            positions.append(np.arange(prompt_len, prompt_len + length))
            trained = np.flatnonzero(branch.trained)
            if prompt_len == 0:
                trained = trained[trained > 0]
            source = branch_start + trained
            if not reads_own:
                source -= 1
                source[trained == 0] = start + prompt_len - 1  # the prompt's last token predicts every branch's first
            sources.append(source)
            targets.append(branch.ids[trained])
            branch_numbers.append(np.full(len(trained), len(tree_of_branch)))
            tree_of_branch.append(tree_number)
        start = span.stop

    def flat(parts: list[np.ndarray]) -> Tensor:
        joined = np.concatenate(parts) if parts else np.zeros(0)
        return torch.from_numpy(joined.astype(np.int64)).to(device)

    return Forest(
        flat(ids),
        flat(positions),
        tuple(spans),
        flat(sources),
        flat(targets),
        flat([np.unique(np.concatenate(sources))] if sources else []),
        flat(branch_numbers),
        torch.tensor(tree_of_branch, dtype=torch.int64, device=device),
    )
