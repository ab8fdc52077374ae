"""How a forest lies in the flat sequence, as attention needs it: cut once for all layers.

In: the spans of a forest's trees. Out: the pieces that attend as one, and masks, each made once a forest.
Must not know: models, objectives, files.

Shapes: Q queries and K keys of a piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tunesmith.engine.forest import TreeSpan

Kernel = Literal["sdpa", "varlen", "flex"]
"""The kernels that can attend over a forest."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Queries that attend as one: `num_queries` tokens from `start`, over themselves and, before them, the `prompt_len`
    tokens from `prompt_start` (0 for a tree's first piece, which holds its prompt itself)."""

    start: int
    num_queries: int
    prompt_start: int = 0
    prompt_len: int = 0

    @property
    def num_keys(self) -> int:
        """K: the prompt's tokens and its own."""
        return self.prompt_len + self.num_queries

    def keys_of(self, flat: Tensor) -> Tensor:
        """[1, G, K, D] of the keys or values [1, G, T, D]: a view where the piece holds its prompt, else a copy."""
        own = flat[:, :, self.start : self.start + self.num_queries]
        if not self.prompt_len:
            return own
        return torch.cat((flat[:, :, self.prompt_start : self.prompt_start + self.prompt_len], own), 2)

    def put_back(self, flat: Tensor, keys: Tensor) -> None:
        """The other way, where `keys_of` made a copy: write it to its places."""
        if self.prompt_len:
            flat[:, :, self.prompt_start : self.prompt_start + self.prompt_len] = keys[:, :, : self.prompt_len]
            flat[:, :, self.start : self.start + self.num_queries] = keys[:, :, self.prompt_len :]


class ForestLayout:
    """The spans of a forest, cut once for all layers, and the masks that they need, made once a forest."""

    def __init__(self, spans: Sequence[TreeSpan], backend: Kernel = "sdpa", read_R: Tensor | None = None) -> None:
        self.spans = tuple(spans)
        self.read_R = read_R  # the tokens whose last hidden state a loss reads; None: all of them
        self.backend = backend
        self.memo: dict[object, object] = {}  # what a backend makes once a forest: cumulative lengths, a block mask
        self._masks: dict[tuple[int, int, int, torch.dtype], Tensor] = {}
        self.pieces: list[Piece] = []  # prompt + branch 1, branch 2, ... of every tree
        for span in self.spans:
            (_, first), *others = span.branch_starts()
            self.pieces.append(Piece(span.start, span.prompt_len + first))
            self.pieces.extend(Piece(start, length, span.start, span.prompt_len) for start, length in others)
        self.cuts = [piece.num_queries for piece in self.pieces]

    def mask(self, num_queries: int, num_keys: int, window: int | None, like: Tensor) -> Tensor | None:
        """Additive causal mask [Q, K], aligned bottom-right; None where plain causal attention is the same thing.

        `window` keys are visible, the query's own among them; None: all of them.
        """
        reach = num_keys if window is None else min(window, num_keys)
        if num_queries == num_keys == reach:
            return None
        key = (num_queries, num_keys, reach, like.dtype)
        if key not in self._masks:
            query_Q = torch.arange(num_keys - num_queries, num_keys, device=like.device)[:, None]
            key_K = torch.arange(num_keys, device=like.device)[None, :]
            hidden_QK = (key_K > query_Q) | (key_K <= query_Q - reach)
            zeros_QK = torch.zeros(num_queries, num_keys, dtype=like.dtype, device=like.device)
            self._masks[key] = zeros_QK.masked_fill(hidden_QK, float("-inf"))
        return self._masks[key]

    def strip_mask(self, num_queries: int, num_keys: int, window: int | None, like: Tensor) -> Tensor | None:
        """As `mask`, for many lengths: a view of one mask for so many queries, cut at its right end."""
        if num_queries == num_keys and (window is None or window >= num_keys):
            return None
        key = ("strip", num_queries, window, like.dtype)
        widest = self.memo.get(key)
        if not isinstance(widest, Tensor):
            most = max(piece.num_keys for piece in self.pieces)
            widest = self.mask(num_queries, max(most, num_queries + 1), window, like)
            assert widest is not None
            self.memo[key] = widest
        return widest[:, -num_keys:]
