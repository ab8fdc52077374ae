"""Attention over a forest by FlexAttention: one compiled kernel that skips the blocks in which nothing is visible.

In: queries, keys and values of one flat sequence, and its layout. Out: the attended values.
Must not know: models, objectives, files.

A key is seen by the queries from its own place up to where it stops being visible: the end of its branch, or of its
tree for a prompt's token. So one number a key says everything, for single tokens and, by the smallest and largest
number in a block, for blocks of 128 x 128; no mask of T x T is ever made. The flat length is padded to whole blocks,
so that one compiled kernel serves all forests.

Shapes: A query heads, G key/value heads (A a multiple of G), T tokens padded to whole blocks, N blocks, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from tunesmith.engine import sdpa
from tunesmith.engine.layout import ForestLayout

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128
"""Tokens of a block on either side: what FlexAttention's kernels are tuned for."""
MIN_BLOCKS = 2
"""A dimension of one is compiled as a constant, and would need a kernel of its own."""
VARIANTS = 32
"""Compiled kernels that torch may keep: with and without window, soft-cap and gradient, and one more of each where the
first forest has as many blocks as the model has heads, which torch then takes for one number. Past its limit of 8 it
would fall back, in silence, to the form that keeps all scores."""


def padded_length(num_tokens: int) -> int:
    """T of a forest of so many tokens."""
    return BLOCK * max(MIN_BLOCKS, -(-num_tokens // BLOCK))


def _stops_and_positions(layout: ForestLayout) -> tuple[np.ndarray, np.ndarray]:
    """For each token the flat index where it stops being visible, and its position in its row; both int64 [T].

    The padding is a row of its own behind the last tree, so that every query sees something.
    """
    end = layout.spans[-1].stop
    length = padded_length(end)
    stop_T = np.full(length, length)
    position_T = np.arange(length) - end
    for span in layout.spans:
        first = span.start + span.prompt_len
        stop_T[span.start : first] = span.stop
        position_T[span.start : first] = np.arange(span.prompt_len)
        for start, size in span.branch_starts():
            stop_T[start : start + size] = start + size
            position_T[start : start + size] = np.arange(span.prompt_len, span.prompt_len + size)
    return stop_T, position_T


def visible_blocks(stop_T: np.ndarray, position_T: np.ndarray, window: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Blocks of [queries, keys] in which something is visible, and those in which everything is; bool [N, N].

    With a window the first may hold a block in which nothing is: it costs time, and changes nothing.
    """
    stop_NB, position_NB = stop_T.reshape(-1, BLOCK), position_T.reshape(-1, BLOCK)
    first_N = np.arange(len(stop_NB)) * BLOCK
    earlier_NN = first_N[:, None] > first_N[None, :]
    same_NN = np.eye(len(first_N), dtype=np.bool_)
    some_NN = same_NN | (earlier_NN & (stop_NB.max(1)[None, :] > first_N[:, None]))
    all_NN = earlier_NN & (stop_NB.min(1)[None, :] >= first_N[:, None] + BLOCK)
    if window is not None:
        nearest_NN = position_NB.min(1)[:, None] - position_NB.max(1)[None, :]
        farthest_NN = position_NB.max(1)[:, None] - position_NB.min(1)[None, :]
        some_NN &= same_NN | (nearest_NN < window)
        all_NN &= farthest_NN < window
    return some_NN, all_NN


def _mask_mod(stop_T: Tensor, position_T: Tensor, window: int | None) -> Callable[..., Tensor]:
    """The rule for single tokens, as FlexAttention wants it. It reads tensors alone: a number would be compiled in, or
    with dynamic shapes not compiled at all."""

    def visible(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (query < stop_T[key])

    if window is None:
        return visible
    limit_T = position_T + window

    def near(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (query < stop_T[key]) & (position_T[query] < limit_T[key])

    return near


def block_mask(layout: ForestLayout, window: int | None, device: torch.device) -> BlockMask:
    """The forest's block mask for a window, made at the first call and kept in the layout."""
    from torch.nn.attention.flex_attention import BlockMask

    made = layout.memo.get(("flex", window))
    if isinstance(made, BlockMask):
        return made
    stop_T, position_T = _stops_and_positions(layout)
    some_NN, all_NN = visible_blocks(stop_T, position_T, window)

    def listed(blocks_NN: np.ndarray) -> tuple[Tensor, Tensor]:
        """How many blocks each row has, and which, those first."""
        counts_N = torch.from_numpy(blocks_NN.sum(1).astype(np.int32)).to(device)
        order_NN = torch.from_numpy(np.argsort(~blocks_NN, axis=1, kind="stable").astype(np.int32)).to(device)
        return counts_N[None, None], order_NN[None, None]

    mask_mod = _mask_mod(torch.from_numpy(stop_T).to(device), torch.from_numpy(position_T).to(device), window)
    made = BlockMask.from_kv_blocks(
        *listed(some_NN & ~all_NN), *listed(all_NN), BLOCK_SIZE=BLOCK, mask_mod=mask_mod, seq_lengths=(len(stop_T),) * 2
    )
    layout.memo["flex", window] = made
    return made


@cache
def _soft_capped(softcap: float, device: torch.device) -> Callable[..., Tensor]:
    """softcap * tanh(score / softcap); one function a value, so that compiled kernels are found again."""
    cap = torch.tensor(softcap, device=device)

    def capped(score: Tensor, _batch: Tensor, _head: Tensor, _query: Tensor, _key: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return capped


@cache
def _kernel(device_type: str) -> Callable[..., Tensor]:
    """FlexAttention: compiled once a process for any length; as it is on a CPU, where it only computes forwards."""
    kernel: Callable[..., Tensor] = import_module("torch.nn.attention.flex_attention").flex_attention
    if device_type == "cpu":
        return kernel
    from torch._dynamo import config as dynamo

    dynamo.recompile_limit = max(dynamo.recompile_limit, VARIANTS)
    return torch.compile(kernel, dynamic=True)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: ForestLayout,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attend [1, A, T, D] queries over [1, G, T, D] keys and values (here T is not padded); returns [1, T, A, D].

    `window` keys are visible, the query's own among them. Attention dropout, which the kernel lacks, is `sdpa`'s.
    """
    if dropout:
        return sdpa.attend(query, key, value, layout, scale=scale, window=window, softcap=softcap, dropout=dropout)
    num_tokens = query.shape[2]
    kind = value.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
    whole = partial(pad, pad=(0, 0, 0, padded_length(num_tokens) - num_tokens))
    reach = None if window is None or window >= _longest_row(layout) else window
    attended = _kernel(kind)(
        *(whole(part.to(dtype)) for part in (query, key, value)),
        score_mod=None if softcap is None else _soft_capped(softcap, query.device),
        block_mask=block_mask(layout, reach, query.device),
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return attended[:, :, :num_tokens].transpose(1, 2)


def _longest_row(layout: ForestLayout) -> int:
    return max(span.prompt_len + max(span.branch_lens) for span in layout.spans)
