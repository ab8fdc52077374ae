"""Attention over a forest as one call of a flash kernel for sequences of many lengths.

In: queries, keys and values of one flat sequence, and its layout. Out: the attended values.
Must not know: models, objectives, files.

The sequences are (queries: prompt + branch 1, keys: the same) and, for every further branch, (queries: the branch,
keys: prompt + branch). The kernel aligns bottom-right (query i of Q sees keys up to i + K - Q, in its source), so a
branch sees its whole prompt and itself causally, without a mask. Queries lie in this order already; keys and values
are gathered by one index, made once a forest. Where every tree has one branch nothing is gathered.

Shapes: A query heads, G key/value heads (A a multiple of G), T tokens, K keys of all sequences, S sequences, D head
size, R tokens of the prompts that have a branch of some rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from inspect import signature

import numpy as np
import torch
from torch import Tensor

from tunesmith.engine import sdpa
from tunesmith.engine.forest import TreeSpan
from tunesmith.engine.layout import ForestLayout

HALF = (torch.bfloat16, torch.float16)
"""The types that flash kernels compute in."""


@dataclass(frozen=True, slots=True, eq=False)
class Sequences:
    """A forest as the kernel reads it.

    query_starts_S1, key_starts_S1: int32, cumulative lengths. key_K: flat index of every key, or None where the keys
    are the queries' tokens in their order. home_T: where among the keys a token stands with its own queries.
    copies: for each rank of further branches (second, third, ...) the prompts' tokens, [R], and where their copies
    stand among the keys, [R]: within a rank no token comes twice.
    """

    query_starts_S1: Tensor
    key_starts_S1: Tensor
    longest_queries: int
    longest_keys: int
    key_K: Tensor | None
    home_T: Tensor | None
    copies: tuple[tuple[Tensor, Tensor], ...]


def sequences_of(layout: ForestLayout, device: torch.device) -> Sequences:
    """The forest's sequences, made at the first call and kept in the layout."""
    made = layout.memo.get("varlen")
    if not isinstance(made, Sequences):
        made = _sequences(layout, device)
        layout.memo["varlen"] = made
    return made


def _sequences(layout: ForestLayout, device: torch.device) -> Sequences:
    pieces = [piece for span in layout.spans for piece in _pieces(span)]
    query_lens = [len(own_Q) for _, own_Q, _ in pieces]
    key_lens = [len(copied_R) + len(own_Q) for copied_R, own_Q, _ in pieces]
    key_starts = np.concatenate(([0], np.cumsum(key_lens)))
    num_ranks = max(rank for _, _, rank in pieces)

    def joined(parts: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate(parts)).to(device)

    copies = []
    for wanted in range(1, num_ranks + 1):
        found = [
            (copied_R, start) for (copied_R, _, rank), start in zip(pieces, key_starts, strict=False) if rank == wanted
        ]
        places = [np.arange(start, start + len(copied_R)) for copied_R, start in found]
        copies.append((joined([copied_R for copied_R, _ in found]), joined(places)))
    homes = [np.arange(stop - size, stop) for size, stop in zip(query_lens, key_starts[1:], strict=True)]
    starts = [np.concatenate(([0], np.cumsum(lengths))).astype(np.int32) for lengths in (query_lens, key_lens)]
    return Sequences(
        torch.from_numpy(starts[0]).to(device),
        torch.from_numpy(starts[1]).to(device),
        max(query_lens),
        max(key_lens),
        joined([ids for copied_R, own_Q, _ in pieces for ids in (copied_R, own_Q)]) if copies else None,
        joined(homes) if copies else None,
        tuple(copies),
    )


def _pieces(span: TreeSpan) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """A tree's sequences: flat indices of the keys that are copied, of the tokens with queries, and the rank."""
    for rank, (start, length) in enumerate(span.branch_starts()):
        copied_R = np.arange(span.start, span.start + (span.prompt_len if rank else 0))
        yield copied_R, np.arange(start if rank else span.start, start + length), rank


class _Gathered(torch.autograd.Function):
    """Keys or values in the order of the sequences.

    The backward adds up a token's copies rank by rank: autograd's own would add them by atomic operations, in an order
    that changes from run to run.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, flat_TGD: Tensor, sequences: Sequences) -> Tensor:
        """[T, G, D] -> [K, G, D]."""
        ctx.sequences = sequences  # type: ignore[attr-defined]
        assert sequences.key_K is not None
        return flat_TGD.index_select(0, sequences.key_K)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad_KGD: Tensor) -> tuple[Tensor, None]:
        """[K, G, D] -> [T, G, D]."""
        sequences: Sequences = ctx.sequences  # type: ignore[attr-defined]
        assert sequences.home_T is not None
        grad_TGD = grad_KGD.index_select(0, sequences.home_T)
        for token_R, copy_R in sequences.copies:
            grad_TGD.index_add_(0, token_R, grad_KGD.index_select(0, copy_R))
        return grad_TGD, None


@cache
def torch_kernel() -> Callable[..., Tensor] | None:
    """torch's own kernel, from torch 2.11 on (with scale and window); None before."""
    if find_spec("torch.nn.attention.varlen") is None:
        return None
    kernel: Callable[..., Tensor] = import_module("torch.nn.attention.varlen").varlen_attn
    return kernel if {"scale", "window_size"} <= set(signature(kernel).parameters) else None


def has_flash_attn() -> bool:
    """True where the package flash-attn is installed: the kernel that can soft-cap."""
    return find_spec("flash_attn") is not None


@cache
def _must_say_grouped(kernel: Callable[..., Tensor]) -> bool:
    """From torch 2.12 on only a call that says so may have fewer key heads than query heads."""
    return "enable_gqa" in signature(kernel).parameters


def _by_torch(
    query_TAD: Tensor, key_KGD: Tensor, value_KGD: Tensor, sequences: Sequences, *, scale: float, window: int | None
) -> Tensor:
    kernel = torch_kernel()
    assert kernel is not None
    grouped = {"enable_gqa": True} if _must_say_grouped(kernel) else {}
    reach = -1 if window is None or window >= sequences.longest_keys else window - 1
    return kernel(
        query_TAD,
        key_KGD,
        value_KGD,
        sequences.query_starts_S1,
        sequences.key_starts_S1,
        sequences.longest_queries,
        sequences.longest_keys,
        scale=scale,
        window_size=(reach, 0),
        **grouped,
    )


def _by_flash_attn(
    query_TAD: Tensor,
    key_KGD: Tensor,
    value_KGD: Tensor,
    sequences: Sequences,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    kernel: Callable[..., Tensor] = import_module("flash_attn").flash_attn_varlen_func
    return kernel(
        query_TAD,
        key_KGD,
        value_KGD,
        sequences.query_starts_S1,
        sequences.key_starts_S1,
        sequences.longest_queries,
        sequences.longest_keys,
        softmax_scale=scale,
        causal=True,
        window_size=(-1 if window is None else window - 1, 0),
        softcap=softcap or 0.0,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )


def _computed_in(value: Tensor) -> torch.dtype:
    """Autocast knows torch's attention and turns its inputs into half precision, but does not know this kernel."""
    kind = value.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype


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
    """Attend [1, A, T, D] queries over [1, G, T, D] keys and values; returns [1, T, A, D].

    `window` keys are visible, the query's own among them. Attention dropout, which the kernels lack, is `sdpa`'s.
    """
    if dropout:
        return sdpa.attend(query, key, value, layout, scale=scale, window=window, softcap=softcap, dropout=dropout)
    sequences = sequences_of(layout, query.device)
    dtype = _computed_in(value)
    query_TAD, key_KGD, value_KGD = (part[0].transpose(0, 1).to(dtype) for part in (query, key, value))
    if sequences.key_K is not None:
        key_KGD = _Gathered.apply(key_KGD, sequences)  # type: ignore[no-untyped-call]
        value_KGD = _Gathered.apply(value_KGD, sequences)  # type: ignore[no-untyped-call]
    if softcap is None and torch_kernel() is not None:
        return _by_torch(query_TAD, key_KGD, value_KGD, sequences, scale=scale, window=window)[None]
    return _by_flash_attn(query_TAD, key_KGD, value_KGD, sequences, scale=scale, window=window, softcap=softcap)[None]
