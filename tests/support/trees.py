"""Random trees for tests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tunesmith.data.types import Branch, Tree


def random_tree(prompt_len: int, branch_lens: Sequence[int], *, vocabulary: int, seed: int, untrained: int = 0) -> Tree:
    """A tree of random ids; the first `untrained` tokens of every branch are not trained."""
    draw = np.random.default_rng([seed, prompt_len, len(branch_lens)])

    def ids(length: int) -> np.ndarray:
        return draw.integers(3, vocabulary, length).astype(np.int32)

    branches = tuple(Branch(ids(length), np.arange(length) >= untrained) for length in branch_lens)
    return Tree(f"tree-{seed}", ids(prompt_len), branches)


def random_trees(shapes: Sequence[tuple[int, Sequence[int]]], *, vocabulary: int) -> list[Tree]:
    """One random tree a shape (prompt length, branch lengths)."""
    return [
        random_tree(prompt_len, branch_lens, vocabulary=vocabulary, seed=seed)
        for seed, (prompt_len, branch_lens) in enumerate(shapes)
    ]
