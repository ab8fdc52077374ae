"""Attention over forests: a token sees its own tree's prompt and its own branch, causally, and nothing else.

In: queries, keys and values of one flat sequence, and its layout. Out: the attended values.
Must not know: models' classes, objectives, files, how a backend computes.

The function registers itself with transformers' AttentionInterface under `NAME`; the layout travels through the
model's forward as the keyword `forest_layout`, and names the backend that computes.

Generation must not run through it (it gets no mask, so a padded batch would be silently wrong): wrap it in
`ordinary_attention`.

Shapes: A query heads, G key/value heads (A a multiple of G), T tokens, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from tunesmith.engine import flex, sdpa, varlen
from tunesmith.engine.layout import ForestLayout, Kernel

NAME = "tunesmith_forest"

KERNELS: dict[Kernel, Callable[..., Tensor]] = {
    "varlen": varlen.attend,
    "flex": flex.attend,
    "sdpa": sdpa.attend,
}
"""A backend's function: (query, key, value, layout, *, scale, window, softcap, dropout) -> [1, T, A, D]."""


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
    s_aux: Tensor | None = None,
    forest_layout: ForestLayout | None = None,
    **_ignored: object,
) -> tuple[Tensor, None]:
    """Attend [1, A, T, D] queries over [1, G, T, D] keys and values within `forest_layout`; returns [1, T, A, D]."""
    if s_aux is not None:
        raise NotImplementedError("attention sinks")
    if forest_layout is None:
        raise RuntimeError("the forest attention got no layout: run generation inside `ordinary_attention(model)`")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    attend = KERNELS[forest_layout.backend]
    attended = attend(
        query, key, value, forest_layout, scale=scale, window=sliding_window, softcap=softcap, dropout=dropout
    )
    return attended, None


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
