"""Attention over forests: a token sees its own tree's prompt and its own branch, causally, and nothing else.

In: queries, keys and values of one flat sequence, and the spans of its trees. Out: the attended values.
Must not know: models' classes, objectives, files.

The function registers itself with transformers' AttentionInterface under `NAME`; the spans travel through the
model's forward as the keyword `forest_layout`. For a tree of k branches it runs k attentions, never a mask over
the forest: prompt + branch 1 causally over themselves, and every further branch over prompt + branch, aligned
bottom-right (its last query sees its last key). The prompt's queries run once.

Generation must not run through it (it gets no mask, so a padded batch would be silently wrong): wrap it in
`ordinary_attention`.

Shapes: A query heads, G key/value heads (A a multiple of G), T tokens, Q queries and K keys of a span, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout as drop
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from tunesmith.engine.forest import TreeSpan

NAME = "tunesmith_forest"


class ForestLayout:
    """The spans of a forest, cut once for all layers, and the masks that they need, made once a forest."""

    def __init__(self, spans: Sequence[TreeSpan]) -> None:
        self.spans = tuple(spans)
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


def forest_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    forest_layout: ForestLayout | None = None,
    **_ignored: object,
) -> tuple[Tensor, None]:
    """Attend [1, A, T, D] queries over [1, G, T, D] keys and values within `forest_layout`; returns [1, T, A, D]."""
    if forest_layout is None:
        raise RuntimeError("the forest attention got no layout: run generation inside `ordinary_attention(model)`")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    grouped = query.shape[1] != key.shape[1]

    def attend(query_Q: Tensor, key_K: Tensor, value_K: Tensor) -> Tensor:
        mask_QK = forest_layout.mask(query_Q.shape[2], key_K.shape[2], sliding_window, query)
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

    pieces = zip(*(part.split(forest_layout.cuts, dim=2) for part in (query, key, value)), strict=True)
    attended: list[Tensor] = []
    for span in forest_layout.spans:
        query_Q, key_K, value_K = next(pieces)
        attended.append(attend(query_Q, key_K, value_K))
        if len(span.branch_lens) == 1:
            continue
        prompt_key, prompt_value = key_K[:, :, : span.prompt_len], value_K[:, :, : span.prompt_len]
        for _ in span.branch_lens[1:]:
            query_Q, key_K, value_K = next(pieces)
            seen_key, seen_value = torch.cat((prompt_key, key_K), 2), torch.cat((prompt_value, value_K), 2)
            attended.append(attend(query_Q, seen_key, seen_value))
    return torch.cat(attended, dim=1), None


AttentionInterface.register(NAME, forest_attention)


def use_forest_attention(model: PreTrainedModel) -> None:
    """Switch `model` to the forest attention; it stays on, since recomputed activations need it in the backward."""
    if model.config._attn_implementation != NAME:
        model.set_attn_implementation(NAME)


@contextmanager
def ordinary_attention(model: PreTrainedModel) -> Iterator[None]:
    """Run `model` under an attention of transformers' own, and put back what was on before, exceptions included.

    `eager` where the model cannot use sdpa or soft-caps its scores, which sdpa cannot do.
    """
    before = model.config._attn_implementation
    capped = model.config.get_text_config().to_dict().get("attn_logit_softcapping") is not None
    ordinary = "eager" if capped or not model._supports_sdpa else "sdpa"
    if before not in (NAME, "sdpa"):
        ordinary = before
    if ordinary != before:
        model.set_attn_implementation(ordinary)
    try:
        yield
    finally:
        if model.config._attn_implementation != before:
            model.set_attn_implementation(before)
