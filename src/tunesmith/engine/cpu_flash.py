"""Attention over a whole forest on a CPU, in one function: no key is read that the causal rule hides, none is copied.

In: queries, keys and values of one flat sequence, and its layout. Out: the attended values.
Must not know: models, objectives, files.

It calls the kernel behind torch's `scaled_dot_product_attention` on a CPU, which works through keys in blocks of 512,
also those behind the causal border: up to twice the arithmetic for rows of a few hundred tokens. Here the queries of a
piece go in strips of `STRIP`, each over the keys that it may see, and gradients of keys and values that several strips
share are summed in place. The kernel has no public name: `works` tries it once, and the public way stands in for it.

Shapes: A query heads, G key/value heads (A a multiple of G), T tokens, Q queries and K keys of a strip, P tokens of a
prompt, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tunesmith.engine.layout import ForestLayout, Piece

STRIP = 64
"""Queries at a time. Smaller strips waste less at the causal border and start more kernels."""
LONG = 1536
"""From here on what the kernel wastes at the border is small beside the rest, and the sums over strips are not."""


@dataclass(frozen=True, slots=True)
class Strip:
    """Queries `start` to `stop` of a piece, over its keys `first` to `last`; both count within the piece's keys and
    queries, where the prompt's keys come first."""

    start: int
    stop: int
    first: int
    last: int


def strips(piece: Piece, window: int | None) -> Iterator[Strip]:
    """The strips of a piece. A query sees the keys before it and its own, of which at most `window`."""
    hidden = piece.num_keys - piece.num_queries
    size = STRIP if piece.num_queries > 2 * STRIP else piece.num_queries
    if piece.num_queries > LONG:
        sees_all = hidden == 0 and (window is None or window >= piece.num_keys)
        size = piece.num_queries if sees_all else STRIP * -(-piece.num_queries // (16 * STRIP))
    for start in range(0, piece.num_queries, size):
        stop = min(start + size, piece.num_queries)
        first = 0 if window is None else max(0, hidden + start - window + 1)
        yield Strip(start, stop, first, hidden + stop)


def _kernel(
    query: Tensor, key: Tensor, value: Tensor, mask_QK: Tensor | None, *, scale: float
) -> tuple[Tensor, Tensor]:
    """Attended values [1, A, Q, D] and the log of each query's sum of exponentials [1, A, Q]."""
    out, norm = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, mask_QK is None, attn_mask=mask_QK, scale=scale
    )
    return out, norm


def _kernel_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    norm: Tensor,
    mask_QK: Tensor | None,
    *,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    grads: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, query, key, value, out, norm, 0.0, mask_QK is None, attn_mask=mask_QK, scale=scale
    )
    return grads


class _ForestFlash(torch.autograd.Function):
    """Attention of every token to its own tree's prompt and its own branch."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: ForestLayout,
        scale: float,
        window: int | None,
    ) -> Tensor:
        """[1, T, A, D]."""
        out = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
        norms: list[Tensor] = []
        for piece in layout.pieces:
            queries = slice(piece.start, piece.start + piece.num_queries)
            seen_key, seen_value = piece.keys_of(key), piece.keys_of(value)
            for strip in strips(piece, window):
                here = slice(queries.start + strip.start, queries.start + strip.stop)
                keys = slice(strip.first, strip.last)
                mask_QK = layout.strip_mask(strip.stop - strip.start, strip.last - strip.first, window, query)
                part, norm = _kernel(
                    query[:, :, here], seen_key[:, :, keys], seen_value[:, :, keys], mask_QK, scale=scale
                )
                out[:, here] = part.transpose(1, 2)
                norms.append(norm)
        if any(ctx.needs_input_grad):  # type: ignore[attr-defined]
            ctx.layout, ctx.scale, ctx.window = layout, scale, window  # type: ignore[attr-defined]
            ctx.save_for_backward(query, key, value, out, *norms)
        return out

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        """Gradients of queries, keys and values."""
        query, key, value, out, *norms = ctx.saved_tensors  # type: ignore[attr-defined]
        layout, scale, window = ctx.layout, ctx.scale, ctx.window  # type: ignore[attr-defined]
        grads = [_zeros_like(part) for part in (query, key, value)]
        number = 0
        for piece in layout.pieces:
            seen_key, seen_value = piece.keys_of(key), piece.keys_of(value)
            sums = [piece.keys_of(part) for part in grads[1:]]  # views where the piece has no prompt apart, else copies
            for strip in strips(piece, window):
                here = slice(piece.start + strip.start, piece.start + strip.stop)
                keys = slice(strip.first, strip.last)
                mask_QK = layout.strip_mask(strip.stop - strip.start, strip.last - strip.first, window, query)
                grad_query, grad_key, grad_value = _kernel_backward(
                    grad[:, here].transpose(1, 2),
                    query[:, :, here],
                    seen_key[:, :, keys],
                    seen_value[:, :, keys],
                    out[:, here].transpose(1, 2),
                    norms[number],
                    mask_QK,
                    scale=scale,
                )
                number += 1
                grads[0][:, :, here] = grad_query
                sums[0][:, :, keys] += grad_key
                sums[1][:, :, keys] += grad_value
            for total, summed in zip(grads[1:], sums, strict=True):
                piece.put_back(total, summed)
        return grads[0], grads[1], grads[2], None, None, None


def _zeros_like(part: Tensor) -> Tensor:
    """Zeros [1, A, T, D] that lie token by token, as the layers that they go back to want them."""
    return torch.zeros_like(part.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


def attend(
    query: Tensor, key: Tensor, value: Tensor, layout: ForestLayout, *, scale: float, window: int | None
) -> Tensor:
    """Attend [1, A, T, D] queries over [1, G, T, D] keys and values; returns [1, T, A, D]."""
    attended: Tensor = _ForestFlash.apply(query, key, value, layout, scale, window)  # type: ignore[no-untyped-call]
    return attended


@lru_cache(maxsize=8)
@torch.inference_mode(mode=False)  # whoever asks first may be in it, and nothing has a gradient there
def works(dtype: torch.dtype) -> bool:
    """Whether this torch has the kernel, with grouped heads, masks and strided memory, and gets it right."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, 5, heads, 8, generator=generator).to(dtype).transpose(1, 2) for heads in (4, 2, 2)
    )
    mask_QK = torch.zeros(3, 5, dtype=dtype).masked_fill(torch.ones(3, 5, dtype=torch.bool).triu(3), -torch.inf)
    try:
        with torch.no_grad():
            out, norm = _kernel(query[:, :, 2:], key, value, mask_QK, scale=0.3)
            grad_query, _, _ = _kernel_backward(out, query[:, :, 2:], key, value, out, norm, mask_QK, scale=0.3)
    except (AttributeError, RuntimeError, TypeError, NotImplementedError):
        return False
    with torch.enable_grad():
        leaf = query[:, :, 2:].detach().requires_grad_()
        wanted = scaled_dot_product_attention(
            leaf, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1), attn_mask=mask_QK, scale=0.3
        )
        (wanted_grad,) = torch.autograd.grad(wanted, leaf, wanted.detach())
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    return all(
        float((found - want).detach().abs().max()) < tolerance
        for found, want in ((out, wanted), (grad_query, wanted_grad))
    )
