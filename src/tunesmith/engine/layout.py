"""How a forest lies in the flat sequence, as attention needs it: cut once for all layers.

In: the spans of a forest's trees. Out: the pieces that attend as one, and masks, each made once a forest.
Must not know: models, objectives, files.

Shapes: Q queries and K keys of a piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from tunesmith.engine.forest import TreeSpan

Kernel = Literal["sdpa", "varlen", "flex"]
"""The kernels that can attend over a forest."""


class ForestLayout:
    """The spans of a forest, cut once for all layers, and the masks that they need, made once a forest."""

    def __init__(self, spans: Sequence[TreeSpan], backend: Kernel = "sdpa", read_R: Tensor | None = None) -> None:
        self.spans = tuple(spans)
        self.read_R = read_R  # the tokens whose last hidden state a loss reads; None: all of them
        self.backend = backend
        self.memo: dict[object, object] = {}  # what a backend makes once a forest: cumulative lengths, a block mask
        self._masks: dict[tuple[int, int, int, torch.dtype], Tensor] = {}
        self.cuts: list[int] = []  # lengths of the pieces that attend as one: prompt + branch 1, branch 2, ...
        for span in self.spans:
            self.cuts.append(span.prompt_len + span.branch_lens[0])
            self.cuts.extend(span.branch_lens[1:])

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
