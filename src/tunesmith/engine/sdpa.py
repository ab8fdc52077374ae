"""Attention over a forest as a loop of `scaled_dot_product_attention` over its spans: the portable backend.

On a CPU, where nothing hinders, `cpu_flash` does the same faster.

In: queries, keys and values of one flat sequence, and its layout. Out: the attended values.
Must not know: models, objectives, files.

For a tree of k branches it runs k attentions, never a mask over the forest: prompt + branch 1 causally over
themselves, and every further branch over prompt + branch, aligned bottom-right (its last query sees its last key).
The prompt's queries run once.

Shapes: A query heads, G key/value heads (A a multiple of G), T tokens, Q queries and K keys of a span, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import dropout as drop
from torch.nn.functional import scaled_dot_product_attention

from tunesmith.engine import cpu_flash
from tunesmith.engine.layout import ForestLayout


def _soft_capped(
    query: Tensor, key: Tensor, value: Tensor, mask_QK: Tensor | None, *, scale: float, softcap: float, dropout: float
) -> Tensor:
    """Attention whose scores pass through softcap * tanh(score / softcap) before the softmax (Gemma 2)."""
    num_queries, num_keys = query.shape[-2], key.shape[-2]
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores_QK = softcap * torch.tanh(query @ key.transpose(-1, -2) * (scale / softcap))
    if mask_QK is None:
        future_QK = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device).triu(1)
        scores_QK = scores_QK.masked_fill(future_QK, float("-inf"))
    else:
        scores_QK = scores_QK + mask_QK
    weights_QK = scores_QK.softmax(-1, dtype=torch.float32).to(value.dtype)
    return drop(weights_QK, dropout) @ value


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

    `window` keys are visible, the query's own among them; None: all that the layout allows.
    """
    plain = softcap is None and not dropout and query.dtype == key.dtype == value.dtype
    if plain and query.device.type == "cpu" and cpu_flash.works(query.dtype):
        return cpu_flash.attend(query, key, value, layout, scale=scale, window=window)
    grouped = query.shape[1] != key.shape[1]

    def piece(query_Q: Tensor, key_K: Tensor, value_K: Tensor) -> Tensor:
        mask_QK = layout.mask(query_Q.shape[2], key_K.shape[2], window, query)
        if softcap is not None:
            out = _soft_capped(query_Q, key_K, value_K, mask_QK, scale=scale, softcap=softcap, dropout=dropout)
        else:
            out = scaled_dot_product_attention(
                query_Q,
                key_K,
                value_K,
                attn_mask=mask_QK,
                dropout_p=dropout,
                is_causal=mask_QK is None,
                scale=scale,
                enable_gqa=grouped,
            )
        return out.transpose(1, 2)

    pieces = zip(*(part.split(layout.cuts, dim=2) for part in (query, key, value)), strict=True)
    attended: list[Tensor] = []
    for span in layout.spans:
        query_Q, key_K, value_K = next(pieces)
        attended.append(piece(query_Q, key_K, value_K))
        if len(span.branch_lens) == 1:
            continue
        prompt_key, prompt_value = key_K[:, :, : span.prompt_len], value_K[:, :, : span.prompt_len]
        for _ in span.branch_lens[1:]:
            query_Q, key_K, value_K = next(pieces)
            seen_key, seen_value = torch.cat((prompt_key, key_K), 2), torch.cat((prompt_value, value_K), 2)
            attended.append(piece(query_Q, seen_key, seen_value))
    return torch.cat(attended, dim=1)
