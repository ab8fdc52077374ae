"""Log-probs of trained tokens: a tile of logits at a time is made, read and dropped.

In: hidden states of the tokens before the trained ones, the LM head, the targets. Out: float32 log-probs with gradient.
Must not know: objectives, what a tree means, files.

Shapes: N trained tokens, C of them in a chunk, H hidden size, V vocabulary, v neighbouring columns of it, B branches,
G trees, K rows of the head that are trained while the others are frozen (tokens that were added to the vocabulary).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import linear

from tunesmith.engine.head import Head

CHUNK_BYTES = {"cpu": 64 * 2**20, "cuda": 256 * 2**20}
"""Float32 logits alive at a time where whole rows of them are made: products reach their rate there."""
SHARE_OF_CARD = 64
"""A card's memory over this is the most that its logits take: 256 MiB of 16 GiB, half of that on a card of 8."""
TILE_BYTES = {"cpu": 8 * 2**20}
"""The same where a row is made a stretch of columns at a time: on a CPU what stays in its cache between passes."""
TILE_COLUMNS = {"cpu": 2048}
"""Columns of a tile; where none are given a tile is as wide as the vocabulary, which starts the fewest kernels."""


Extra = Literal["mean", "collision"]
"""What else of a token's distribution the engine can supply. mean: the mean log-prob over the vocabulary, with gradient
(label smoothing); collision: log sum_v p(v)^2, without gradient (WPO)."""


@dataclass(frozen=True, slots=True, eq=False)
class Logprobs:
    """What an objective sees.

    logprob_N: float32, in nats, under the policy; reference_N: the same under the reference, or None.
    branch_N: branch number of each trained token; tree_B: tree number of each branch. Branches of a tree
    are neighbours, in the example's order of answers. extras: by name, [N] each, those that the method wants.
    The rows' own figures, where the trees have them: weight_N of the tokens, score_B of the answers, and of the
    trees label_G (1 desirable, 0 not, nan not said) and weight_G.
    """

    logprob_N: Tensor
    branch_N: Tensor
    tree_B: Tensor
    reference_N: Tensor | None = None
    extras: Mapping[Extra, Tensor] = field(default_factory=dict)
    weight_N: Tensor | None = None
    score_B: Tensor | None = None
    label_G: Tensor | None = None
    weight_G: Tensor | None = None

    def stacked(self, wants: Sequence[Extra]) -> Tensor:
        """Log-probs and the wanted extras side by side, [N, 1 + wanted]."""
        return torch.stack([self.logprob_N, *(self.extras[name] for name in wants)], -1)

    def per_branch(self, values_N: Tensor | None = None) -> Tensor:
        """Sum over each branch's trained tokens, [B]; of the policy's log-probs unless `values_N` is given."""
        values_N = self.logprob_N if values_N is None else values_N
        zeros_B = torch.zeros(len(self.tree_B), dtype=values_N.dtype, device=values_N.device)
        return zeros_B.index_add(0, self.branch_N, values_N)

    def with_reference(self, reference_N: Tensor) -> Logprobs:
        """The same log-probs with the reference's beside them."""
        return replace(self, reference_N=reference_N)


@dataclass(frozen=True, slots=True)
class Tiling:
    """How the [N, V] logits are cut: `rows` by `columns` of them at a time."""

    rows: int
    columns: int

    @classmethod
    def of(cls, head: Head, num_tokens: int, device: str, chunk_bytes: int | None = None) -> Tiling:
        """Tiles of at most `chunk_bytes` in float32; None takes what suits the device."""
        columns = min(head.vocabulary, TILE_COLUMNS.get(device, head.vocabulary))
        if not head.is_linear:
            columns = head.vocabulary
        usual = CHUNK_BYTES.get(device, CHUNK_BYTES["cpu"])
        if device == "cuda" and not chunk_bytes:
            usual = min(usual, torch.cuda.get_device_properties().total_memory // SHARE_OF_CARD)
        if columns < head.vocabulary:
            usual = TILE_BYTES.get(device, usual)
        return cls(max(1, min(num_tokens, (chunk_bytes or usual) // (4 * columns))), columns)

    def chunks(self, num_tokens: int) -> Iterator[slice]:
        """Stretches of the trained tokens."""
        return (slice(start, start + self.rows) for start in range(0, num_tokens, self.rows))


class _LinearHead(torch.autograd.Function):
    """Log-probs under a linear head, and their gradient by the hidden states, from one pass over the logits.

    The gradient of a token's log-prob by its hidden state does not depend on what the loss will be:
    d log p(y) / dh = W_y - sum_v p(v) W_v (each row times the slope of what becomes of the layer's output). The
    forward therefore keeps this direction, [N, H], while it has a tile's exponentials at hand, and the backward scales
    it: two matrix products with W in all, and no logits kept or made again. The tiles of a row meet in a running
    maximum and sum (Milakov and Gimelshein 2018, arXiv:1805.02867), to which the direction is rescaled.
    Only where W itself is trained, the backward makes each tile once more: d log p(y) / dW_v = (1[y = v] - p(v)) h.
    For single rows that are trained (tokens that were added) this factor is kept from the forward, [N, K].
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden_NH: Tensor,
        target_N: Tensor,
        head: Head,
        tiling: Tiling,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        rows_KH: Tensor | None,
    ) -> Tensor:
        """Float32 log-probs [N]; weight, bias and rows are the head's, so that autograd hands them their gradient."""
        wanted = any(ctx.needs_input_grad)  # type: ignore[attr-defined]
        logprob_N = torch.empty(len(target_N), dtype=torch.float32, device=hidden_NH.device)
        norm_N = torch.empty_like(logprob_N)
        dtype = _compute_dtype(hidden_NH)
        direction_NH = torch.empty_like(hidden_NH if wanted else hidden_NH[:0])
        factor_NK = logprob_N.new_empty(len(direction_NH), 0 if rows_KH is None else len(rows_KH))
        with torch.autocast(hidden_NH.device.type, enabled=False):
            for part in tiling.chunks(len(target_N)):
                chunk = _Chunk(head, hidden_NH[part].to(dtype), target_N[part], tiling.columns, wanted=wanted)
                logprob_N[part], norm_N[part] = chunk.read()
                if wanted:
                    direction_NH[part], factor_NK[part] = chunk.direction_CH(), chunk.factor_CK()
        if wanted:
            ctx.head, ctx.tiling, ctx.dtype = head, tiling, dtype  # type: ignore[attr-defined]
            again = any(ctx.needs_input_grad[4:])  # type: ignore[attr-defined]
            ctx.save_for_backward(direction_NH, factor_NK, *((hidden_NH, target_N, norm_N) if again else ()))
        return logprob_N

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the hidden states, [N, H], and of what of the head is trained."""
        direction_NH, factor_NK, *again = ctx.saved_tensors  # type: ignore[attr-defined]
        grad_NH = direction_NH * grad_N[:, None].to(direction_NH.dtype)
        grad_VH = grad_V = grad_KH = None
        if ctx.needs_input_grad[4] or ctx.needs_input_grad[5]:  # type: ignore[attr-defined]
            hidden_NH, target_N, norm_N = again
            head, tiling, dtype = ctx.head, ctx.tiling, ctx.dtype  # type: ignore[attr-defined]
            grad_VH, grad_V = _weight_gradient(head, tiling, hidden_NH.to(dtype), target_N, norm_N, grad_N)
        if ctx.needs_input_grad[6]:  # type: ignore[attr-defined]
            grad_KH = (factor_NK * grad_N[:, None]).T @ again[0].float()
        return grad_NH, None, None, None, grad_VH, grad_V, grad_KH


def _compute_dtype(hidden_NH: Tensor) -> torch.dtype:
    """Type of the products: autocast's where it is on, else the hidden states'."""
    device = hidden_NH.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_NH.dtype


def _tile(head: Head, hidden_CH: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Columns `start` to `stop` of the logits, [C, v] float32, and the rows of W behind them, [v, H]."""
    weight_vH = head.weight_VH[start:stop].to(hidden_CH.dtype)
    bias_v = None if head.bias_V is None else head.bias_V[start:stop].to(hidden_CH.dtype)
    return head.finished(linear(hidden_CH, weight_vH, bias_v).float()), weight_vH


class _Chunk:
    """Some trained tokens on their way through the tiles: running maximum, sum, target's logit and direction."""

    def __init__(self, head: Head, hidden_CH: Tensor, target_C: Tensor, columns: int, *, wanted: bool) -> None:
        self.head, self.hidden_CH, self.wanted, self.columns = head, hidden_CH, wanted, columns
        self.target_C1 = target_C[:, None]
        size = (len(target_C), 1)
        self.top_C1 = hidden_CH.new_full(size, -torch.inf, dtype=torch.float32)
        self.total_C1 = hidden_CH.new_zeros(size, dtype=torch.float32)
        self.chosen_C1 = hidden_CH.new_zeros(size, dtype=torch.float32)  # the target's logit
        self.slope_C1 = hidden_CH.new_ones(size, dtype=torch.float32)  # and what it owes to the layer's output
        self.sum_CH: Tensor | None = None  # sum of p(v) slope(v) W_v, up to the total
        self.odds_CK: Tensor | None = None

    def read(self) -> tuple[Tensor, Tensor]:
        """Go through all columns; log-probs of the targets, [C], and the log of the sum of exponentials, [C]."""
        ids_K = None if self.head.rows is None else self.head.rows.ids_K
        for start in range(0, self.head.vocabulary, self.columns):
            stop = min(start + self.columns, self.head.vocabulary)
            logits_Cv, weight_vH = _tile(self.head, self.hidden_CH, start, stop)
            hidden_k = None if ids_K is None else ids_K[(ids_K >= start) & (ids_K < stop)] - start
            self._add(logits_Cv, weight_vH, self.target_C1 - start, hidden_k)
        if self.head.rows is not None:
            self._add_rows(self.head.rows.weight_KH.detach().to(self.hidden_CH.dtype), self.head.rows.ids_K)
        norm_C1 = self.top_C1 + self.total_C1.log()
        logprob_C1 = self.chosen_C1 - self.top_C1 - self.total_C1.log()
        return logprob_C1.squeeze(-1), norm_C1.squeeze(-1)

    def _add(self, logits_Cv: Tensor, weight_vH: Tensor, place_C1: Tensor, hidden_k: Tensor | None) -> None:
        """One tile; `place_C1` is the target's column in it, or outside; columns `hidden_k` count for nothing."""
        self._note_target(logits_Cv, place_C1)
        slope_Cv = self.head.slope(logits_Cv) if self.wanted else 1.0
        odds_Cv = self._odds(logits_Cv)
        if hidden_k is not None and len(hidden_k):
            odds_Cv[:, hidden_k] = 0
        self.total_C1 += odds_Cv.sum(-1, keepdim=True)
        if not self.wanted:
            return
        if isinstance(slope_Cv, Tensor):
            odds_Cv.mul_(slope_Cv)
        if self.sum_CH is None:
            self.sum_CH = (odds_Cv.to(weight_vH.dtype) @ weight_vH).float()
        elif weight_vH.dtype == torch.float32:
            self.sum_CH.addmm_(odds_Cv, weight_vH)
        else:
            self.sum_CH += odds_Cv.to(weight_vH.dtype) @ weight_vH

    def _odds(self, logits_Cv: Tensor) -> Tensor:
        """p(v) / p(top) in the logits' memory; what was summed before is rescaled to the new maximum."""
        top_C1 = torch.maximum(self.top_C1, logits_Cv.amax(-1, keepdim=True))
        odds_Cv = logits_Cv.sub_(top_C1).exp_()
        if self.sum_CH is not None or not self.wanted:
            shrink_C1 = (self.top_C1 - top_C1).exp_()
            self.total_C1 *= shrink_C1
            if self.sum_CH is not None:
                self.sum_CH *= shrink_C1
        self.top_C1 = top_C1
        return odds_Cv

    def _note_target(self, logits_Cv: Tensor, place_C1: Tensor) -> None:
        """Keep the target's logit, and the slope there, of the tokens whose target is in this tile."""
        inside_C1 = (place_C1 >= 0) & (place_C1 < logits_Cv.shape[-1])
        here_C1 = logits_Cv.gather(-1, place_C1.clamp(0, logits_Cv.shape[-1] - 1))
        self.chosen_C1 = torch.where(inside_C1, here_C1, self.chosen_C1)

    def _add_rows(self, rows_KH: Tensor, ids_K: Tensor) -> None:
        """The trained rows, as a last tile of their own; their odds are kept."""
        logits_CK = self.head.finished(linear(self.hidden_CH, rows_KH).float())
        is_row_CK = self.target_C1 == ids_K
        place_C1 = torch.where(is_row_CK.any(-1, keepdim=True), is_row_CK.int().argmax(-1, keepdim=True), -1)
        self._add(logits_CK, rows_KH, place_C1, None)
        self.odds_CK = logits_CK  # in its memory

    def _target_slope(self) -> Tensor | float:
        return self.head.slope(self.chosen_C1)

    def direction_CH(self) -> Tensor:
        """Gradient of each log-prob by its hidden state."""
        assert self.sum_CH is not None
        target_C = self.target_C1.squeeze(-1)
        chosen_CH = self.head.weight_VH[target_C].to(self.hidden_CH.dtype)
        if self.head.rows is not None:
            is_row_CK = self.target_C1 == self.head.rows.ids_K
            rows_CH = is_row_CK.to(chosen_CH.dtype) @ self.head.rows.weight_KH.detach().to(chosen_CH.dtype)
            chosen_CH = torch.where(is_row_CK.any(-1, keepdim=True), rows_CH, chosen_CH)
        slope = self._target_slope()
        scale_C1 = (1.0 if self.head.softcap is not None else slope) / self.total_C1
        return chosen_CH * slope - self.sum_CH.mul_(scale_C1)

    def factor_CK(self) -> Tensor:
        """What each token's log-prob adds to the gradients of the trained rows, in hidden states."""
        if self.head.rows is None:
            return self.total_C1[:, :0]
        assert self.odds_CK is not None
        slope = self._target_slope()
        scale_C1 = (1.0 if self.head.softcap is not None else slope) / self.total_C1
        return (self.target_C1 == self.head.rows.ids_K) * slope - self.odds_CK * scale_C1


def _weight_gradient(
    head: Head,
    tiling: Tiling,
    hidden_NH: Tensor,
    target_N: Tensor,
    norm_N: Tensor,
    grad_N: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of W, [V, H], and of its bias, [V]: every tile is made once more."""
    grad_VH = torch.zeros_like(head.weight_VH)
    grad_V = None if head.bias_V is None else torch.zeros_like(head.bias_V)
    for part in tiling.chunks(len(target_N)):
        hidden_CH, grad_C1 = hidden_NH[part], grad_N[part, None]
        for start in range(0, head.vocabulary, tiling.columns):
            stop = min(start + tiling.columns, head.vocabulary)
            logits_Cv, _ = _tile(head, hidden_CH, start, stop)
            place_C = target_N[part] - start
            slope_Cv = head.slope(logits_Cv)
            share_Cv = logits_Cv.sub_(norm_N[part, None]).exp_().mul_(-grad_C1)
            inside_C = ((place_C >= 0) & (place_C < stop - start)).nonzero().squeeze(-1)
            share_Cv[inside_C, place_C[inside_C]] += grad_C1[inside_C, 0]
            share_Cv.mul_(slope_Cv)
            if grad_V is not None:
                grad_V[start:stop] += share_Cv.sum(0)
            grad_VH[start:stop] += (share_Cv.to(hidden_CH.dtype).T @ hidden_CH).to(grad_VH.dtype)
    return grad_VH, grad_V


def _chunk_logprobs(head: Head, hidden_CH: Tensor, target_C: Tensor) -> Tensor:
    logits_CV = head.logits(hidden_CH)
    return logits_CV.gather(-1, target_C[:, None]).squeeze(-1) - logits_CV.logsumexp(-1)


class _AnyHead(torch.autograd.Function):
    """Log-probs under a head that is no plain linear layer (an adapter on it): the backward recomputes each chunk
    under autograd."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden_NH: Tensor,
        target_N: Tensor,
        head: Head,
        tiling: Tiling,
        *parameters: Tensor,
    ) -> Tensor:
        """Float32 log-probs [N]; `parameters` are the head's, so that autograd hands them their gradient."""
        ctx.head, ctx.tiling = head, tiling  # type: ignore[attr-defined]
        ctx.dtype = _compute_dtype(hidden_NH)  # type: ignore[attr-defined]
        ctx.save_for_backward(hidden_NH, target_N, *parameters)
        parts = tiling.chunks(len(target_N))
        return torch.cat([_chunk_logprobs(head, hidden_NH[part], target_N[part]) for part in parts])

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the hidden states and of every parameter of the head."""
        hidden_NH, target_N, *parameters = ctx.saved_tensors  # type: ignore[attr-defined]
        device, dtype = hidden_NH.device.type, ctx.dtype  # type: ignore[attr-defined]
        grad_NH = torch.empty_like(hidden_NH)
        totals: list[Tensor] = [torch.zeros_like(parameter) for parameter in parameters]
        for part in ctx.tiling.chunks(len(target_N)):  # type: ignore[attr-defined]
            autocast = torch.autocast(device, dtype=dtype, enabled=dtype != hidden_NH.dtype)
            with torch.enable_grad(), autocast:
                hidden_CH = hidden_NH[part].detach().requires_grad_()
                logprob_C = _chunk_logprobs(ctx.head, hidden_CH, target_N[part])  # type: ignore[attr-defined]
            grad_CH, *grads = torch.autograd.grad(logprob_C, (hidden_CH, *parameters), grad_N[part])
            grad_NH[part] = grad_CH
            for total, grad in zip(totals, grads, strict=True):
                total += grad
        return (grad_NH, None, None, None, *totals)


def token_logprobs(hidden_NH: Tensor, target_N: Tensor, head: Head, *, chunk_bytes: int | None = None) -> Tensor:
    """Log-prob of each target given the hidden state before it, [N], float32, in nats.

    Never holds more than `chunk_bytes` of float32 logits (and one more copy of them while it works on them); None
    takes what suits the device.
    """
    if not len(target_N):
        return hidden_NH.sum(-1).float()  # empty, but still part of the graph
    tiling = Tiling.of(head, len(target_N), hidden_NH.device.type, chunk_bytes)
    if not head.is_linear:
        return _AnyHead.apply(hidden_NH, target_N, head, tiling, *head.trainable())  # type: ignore[no-untyped-call, no-any-return]
    rows_KH = None if head.rows is None else head.rows.weight_KH
    return _LinearHead.apply(hidden_NH, target_N, head, tiling, head.weight_VH, head.bias_V, rows_KH)  # type: ignore[no-untyped-call, no-any-return]
