"""Stand-ins for flash kernels (a loop over the sequences, in any type, with their conventions), and spans for them."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from tunesmith.engine.forest import TreeSpan


def spans(*shapes: tuple[int, tuple[int, ...]]) -> list[TreeSpan]:
    """Trees laid end to end, each by its prompt's and its branches' lengths."""
    found: list[TreeSpan] = []
    for prompt_len, branch_lens in shapes:
        found.append(TreeSpan(found[-1].stop if found else 0, prompt_len, branch_lens))
    return found


def _starts(cumulative: Tensor, total: int, longest: int) -> list[int]:
    """The kernels' own demands: int32, contiguous, from 0 to the end; and the longest sequence is as long as said."""
    assert cumulative.dtype == torch.int32
    assert cumulative.is_contiguous()
    starts = cumulative.tolist()
    assert starts[0] == 0
    assert starts[-1] == total
    assert max(stop - start for start, stop in pairwise(starts)) == longest
    return starts


def _attended(query: Tensor, key: Tensor, value: Tensor, *, scale: float, left: int, softcap: float) -> Tensor:
    """[Q, A, D] queries over [K, G, D] keys: causal, aligned bottom-right, `left` keys before the query's own."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = torch.einsum("qad,kad->aqk", query, key) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    own = torch.arange(len(query))[:, None] + len(key) - len(query)
    behind = own - torch.arange(len(key))[None, :]
    hidden = (behind < 0) | ((behind > left) if left >= 0 else torch.zeros_like(behind, dtype=torch.bool))
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("aqk,kad->qad", weights, value)


def _loop(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts_q: Tensor,
    starts_k: Tensor,
    longest_q: int,
    longest_k: int,
    *,
    scale: float,
    left: int,
    softcap: float = 0.0,
) -> Tensor:
    assert query.dtype == key.dtype == value.dtype
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    queries = _starts(starts_q, len(query), longest_q)
    keys = _starts(starts_k, len(key), longest_k)
    parts = [
        _attended(
            query[queries[number] : queries[number + 1]],
            key[keys[number] : keys[number + 1]],
            value[keys[number] : keys[number + 1]],
            scale=scale,
            left=left,
            softcap=softcap,
        )
        for number in range(len(queries) - 1)
    ]
    return torch.cat(parts)


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """What torch.nn.attention.varlen.varlen_attn computes, in its signature of torch 2.13."""
    assert scale is not None
    assert window_size[1] == 0
    assert enable_gqa or query.shape[1] == key.shape[1]
    return _loop(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, left=window_size[0])


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
) -> Tensor:
    """What flash_attn.flash_attn_varlen_func computes, in its signature of flash-attn 2.6 to 2.8."""
    assert causal
    assert softmax_scale is not None
    left = window_size[0]
    return _loop(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale=softmax_scale, left=left, softcap=softcap
    )
