# ruff: noqa: ANN001, ANN202
"""Log-probs under a frozen head in Triton: two candidates for the engine, measured by `head.py`.

In: hidden states, the head's weight, targets. Out: float32 log-probs whose gradient by the hidden states is kept from
the forward pass, as `tunesmith.engine.logprobs` keeps it. Must not know: models, objectives, the engine.

`tiled` never stores a logit: a program holds a tile of tokens x vocabulary, reduces it to running maximum, sum and
chosen logit, and a second kernel makes each tile again and adds p(v) W_v to the direction. It computes 6 N V H
operations (the engine's chunks: 4 N V H), and its atomic additions are not ordered, so results vary in rounding.
`rows` leaves the two products to the matrix library and fuses all that lies between them: one kernel reads a chunk of
logits twice and writes unnormalized probabilities over it, some 6 bytes a logit in bfloat16 instead of some 40.

Imported only where Triton is. TRITON_INTERPRET=1 runs it on a CPU, slowly: that is how it is tested.
Shapes: N trained tokens, H hidden size, V vocabulary, C tokens of a chunk, S parts of the vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import linear


@triton.jit
def _tile_logits(
    hidden, weight, n, v, num_n, num_v, num_h, BN: tl.constexpr, BV: tl.constexpr, BH: tl.constexpr, IEEE: tl.constexpr
):
    """Float32 logits of a tile [BN, BV]; -inf behind the vocabulary's end."""
    logits = tl.zeros((BN, BV), dtype=tl.float32)
    for start in range(0, num_h, BH):
        h = start + tl.arange(0, BH)
        left = tl.load(
            hidden + n[:, None].to(tl.int64) * num_h + h[None, :],
            mask=(n[:, None] < num_n) & (h[None, :] < num_h),
            other=0.0,
        )
        right = tl.load(
            weight + v[:, None].to(tl.int64) * num_h + h[None, :],
            mask=(v[:, None] < num_v) & (h[None, :] < num_h),
            other=0.0,
        )
        if IEEE:
            logits = tl.dot(left, tl.trans(right), logits, input_precision="ieee")
        else:
            logits = tl.dot(left, tl.trans(right), logits)
    return tl.where(v[None, :] < num_v, logits, float("-inf"))


@triton.jit
def _score_kernel(
    hidden,
    weight,
    target,
    top_out,
    total_out,
    chosen_out,
    num_n,
    num_v,
    num_h,
    part_v,
    BN: tl.constexpr,
    BV: tl.constexpr,
    BH: tl.constexpr,
    IEEE: tl.constexpr,
):
    """Of BN tokens and one part of the vocabulary: maximum, sum of exp(logit - maximum), and the target's logit."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    part = tl.program_id(1)
    wanted = tl.load(target + n, mask=n < num_n, other=-1)
    top = tl.full((BN,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BN,), dtype=tl.float32)
    chosen = tl.zeros((BN,), dtype=tl.float32)
    for start in range(part * part_v, tl.minimum((part + 1) * part_v, num_v), BV):
        v = start + tl.arange(0, BV)
        logits = _tile_logits(hidden, weight, n, v, num_n, num_v, num_h, BN, BV, BH, IEEE)
        higher = tl.maximum(top, tl.max(logits, 1))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(logits - higher[:, None]), 1)
        top = higher
        chosen += tl.sum(tl.where(v[None, :] == wanted[:, None], logits, 0.0), 1)
    place = part * num_n + n
    tl.store(top_out + place, top, mask=n < num_n)
    tl.store(total_out + place, total, mask=n < num_n)
    tl.store(chosen_out + place, chosen, mask=n < num_n)


@triton.jit
def _direction_kernel(
    hidden,
    weight,
    normalizer,
    out,
    num_n,
    num_v,
    num_h,
    part_v,
    BN: tl.constexpr,
    BV: tl.constexpr,
    BH: tl.constexpr,
    IEEE: tl.constexpr,
):
    """Add sum_v p(v) W_v over one part of the vocabulary to `out`, float32 [N, H]."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    part = tl.program_id(1)
    total = tl.load(normalizer + n, mask=n < num_n, other=0.0)
    for start in range(part * part_v, tl.minimum((part + 1) * part_v, num_v), BV):
        v = start + tl.arange(0, BV)
        logits = _tile_logits(hidden, weight, n, v, num_n, num_v, num_h, BN, BV, BH, IEEE)
        odds = tl.exp(logits - total[:, None]).to(weight.dtype.element_ty)
        for begin in range(0, num_h, BH):
            h = begin + tl.arange(0, BH)
            rows = tl.load(
                weight + v[:, None].to(tl.int64) * num_h + h[None, :],
                mask=(v[:, None] < num_v) & (h[None, :] < num_h),
                other=0.0,
            )
            if IEEE:
                added = tl.dot(odds, rows, input_precision="ieee")
            else:
                added = tl.dot(odds, rows)
            tl.atomic_add(
                out + n[:, None].to(tl.int64) * num_h + h[None, :],
                added,
                mask=(n[:, None] < num_n) & (h[None, :] < num_h),
                sem="relaxed",
            )


@triton.jit
def _rows_kernel(logits, target, top_out, total_out, chosen_out, num_v, BV: tl.constexpr):
    """One token's logits: maximum, sum and chosen logit in one reading; exp(logit - maximum) written over them."""
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * num_v
    lane = tl.arange(0, BV)
    top = tl.full((BV,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BV,), dtype=tl.float32)
    for start in range(0, num_v, BV):
        v = start + lane
        values = tl.load(base + v, mask=v < num_v, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, values)
        safe = tl.where(higher == float("-inf"), 0.0, higher)  # a lane that has seen nothing yet
        total = total * tl.exp(top - safe) + tl.exp(values - safe)
        top = higher
    highest = tl.max(top, 0)
    tl.store(top_out + row, highest)
    tl.store(total_out + row, tl.sum(total * tl.exp(top - highest), 0))
    tl.store(chosen_out + row, tl.load(base + tl.load(target + row)).to(tl.float32))
    tl.debug_barrier()  # the chosen logit is read before it is overwritten
    for start in range(0, num_v, BV):
        v = start + lane
        values = tl.load(base + v, mask=v < num_v, other=float("-inf")).to(tl.float32)
        tl.store(base + v, tl.exp(values - highest).to(logits.dtype.element_ty), mask=v < num_v)


def _tiles(hidden_NH: Tensor, vocabulary: int) -> tuple[dict[str, object], tuple[int, int], int]:
    """Sizes of tiles, the grid, and the tokens of the vocabulary in one part: enough programs to fill a card."""
    ieee = hidden_NH.dtype == torch.float32
    sizes: dict[str, object] = {"BN": 32, "BV": 32, "BH": 32} if ieee else {"BN": 128, "BV": 128, "BH": 64}
    token_blocks = triton.cdiv(len(hidden_NH), int(str(sizes["BN"])))
    parts = max(1, min(64, triton.cdiv(512, token_blocks)))
    tile = int(str(sizes["BV"]))
    part_v = triton.cdiv(triton.cdiv(vocabulary, parts), tile) * tile
    return {**sizes, "IEEE": ieee}, (token_blocks, triton.cdiv(vocabulary, part_v)), part_v


class _Tiled(torch.autograd.Function):
    """No logit is stored."""

    @staticmethod
    def forward(ctx, hidden_NH: Tensor, target_N: Tensor, weight_VH: Tensor) -> Tensor:
        num_n, num_h = hidden_NH.shape
        vocabulary = len(weight_VH)
        hidden_NH, weight_VH = hidden_NH.contiguous(), weight_VH.contiguous()
        sizes, grid, part_v = _tiles(hidden_NH, vocabulary)
        top_SN, total_SN, chosen_SN = torch.zeros(3, grid[1], num_n, device=hidden_NH.device)
        fixed = (num_n, vocabulary, num_h, part_v)
        _score_kernel[grid](hidden_NH, weight_VH, target_N, top_SN, total_SN, chosen_SN, *fixed, **sizes)
        normalizer_N = (top_SN + total_SN.log()).logsumexp(0)
        if ctx.needs_input_grad[0]:
            expected_NH = torch.zeros(num_n, num_h, device=hidden_NH.device)
            _direction_kernel[grid](hidden_NH, weight_VH, normalizer_N, expected_NH, *fixed, **sizes)
            ctx.save_for_backward((weight_VH[target_N].float() - expected_NH).to(hidden_NH.dtype))
        return chosen_SN.sum(0) - normalizer_N

    @staticmethod
    def backward(ctx, grad_N: Tensor) -> tuple[Tensor, None, None]:
        (direction_NH,) = ctx.saved_tensors
        return direction_NH * grad_N[:, None].to(direction_NH.dtype), None, None


class _Rows(torch.autograd.Function):
    """Chunks of logits in the hidden states' type, two library products, one kernel between them."""

    @staticmethod
    def forward(ctx, hidden_NH: Tensor, target_N: Tensor, weight_VH: Tensor, chunk: int) -> Tensor:
        top_N, total_N, chosen_N = torch.empty(3, len(target_N), device=hidden_NH.device)
        wanted = ctx.needs_input_grad[0]
        direction_NH = torch.empty_like(hidden_NH if wanted else hidden_NH[:0])
        for start in range(0, len(target_N), chunk):
            part = slice(start, start + chunk)
            odds_CV = linear(hidden_NH[part], weight_VH)
            results = (top_N[part], total_N[part], chosen_N[part])
            _rows_kernel[(len(odds_CV),)](odds_CV, target_N[part], *results, len(weight_VH), BV=4096)
            if wanted:
                expected_CH = (odds_CV @ weight_VH) / total_N[part, None]
                direction_NH[part] = (weight_VH[target_N[part]] - expected_CH).to(hidden_NH.dtype)
        if wanted:
            ctx.save_for_backward(direction_NH)
        return chosen_N - top_N - total_N.log()

    @staticmethod
    def backward(ctx, grad_N: Tensor) -> tuple[Tensor, None, None, None]:
        (direction_NH,) = ctx.saved_tensors
        return direction_NH * grad_N[:, None].to(direction_NH.dtype), None, None, None


def tiled(hidden_NH: Tensor, target_N: Tensor, weight_VH: Tensor) -> Tensor:
    """Log-prob of each target, [N], float32; no logit is stored."""
    logprob_N: Tensor = _Tiled.apply(hidden_NH, target_N, weight_VH)
    return logprob_N


def rows(hidden_NH: Tensor, target_N: Tensor, weight_VH: Tensor, *, chunk: int) -> Tensor:
    """Log-prob of each target, [N], float32; `chunk` tokens' logits are alive at a time."""
    logprob_N: Tensor = _Rows.apply(hidden_NH, target_N, weight_VH, chunk)
    return logprob_N
