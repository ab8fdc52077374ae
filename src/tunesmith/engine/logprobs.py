"""Log-probs of trained tokens: a chunk of logits at a time is made, read and dropped.

In: hidden states of the tokens before the trained ones, the LM head, the targets. Out: float32 log-probs with gradient.
Must not know: objectives, what a tree means, files.

Shapes: N trained tokens, C of them in a chunk, H hidden size, V vocabulary, B branches, K rows of the head that are
trained while the others are frozen (tokens that were added to the vocabulary).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from tunesmith.model.added_tokens import Rows, trained_rows

CHUNK_BYTES = {"cpu": 64 * 2**20, "cuda": 256 * 2**20}
"""Float32 logits alive at a time: on a CPU some 500 rows of a vocabulary of 32,000, where products reach their rate."""


@dataclass(frozen=True, slots=True, eq=False)
class Logprobs:
    """What an objective sees.

    logprob_N: float32, in nats, under the policy; reference_N: the same under the reference, or None.
    branch_N: branch number of each trained token; tree_B: tree number of each branch. Branches of a tree
    are neighbours, in the example's order of answers.
    """

    logprob_N: Tensor
    branch_N: Tensor
    tree_B: Tensor
    reference_N: Tensor | None = None

    def per_branch(self, values_N: Tensor | None = None) -> Tensor:
        """Sum over each branch's trained tokens, [B]; of the policy's log-probs unless `values_N` is given."""
        values_N = self.logprob_N if values_N is None else values_N
        zeros_B = torch.zeros(len(self.tree_B), dtype=values_N.dtype, device=values_N.device)
        return zeros_B.index_add(0, self.branch_N, values_N)

    def with_reference(self, reference_N: Tensor) -> Logprobs:
        """The same log-probs with the reference's beside them."""
        return replace(self, reference_N=reference_N)


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """The LM head and what the model does to its output: logits = softcap * tanh(scale * head(h) / softcap).

    `rows` stand in for the rows of the head that have their ids.
    """

    module: nn.Module
    scale: float = 1.0
    softcap: float | None = None
    rows: Rows | None = None

    @classmethod
    def of(cls, model: PreTrainedModel) -> Head:
        """The head of a Hugging Face causal model: Cohere multiplies, Granite divides, Gemma 2 soft-caps its logits."""
        config = model.config.get_text_config().to_dict()
        scale = float(config.get("logit_scale") or 1.0) / float(config.get("logits_scaling") or 1.0)
        module, rows = trained_rows(model.get_output_embeddings())
        return cls(module, scale, config.get("final_logit_softcapping"), rows)

    @property
    def vocabulary(self) -> int:
        """V: rows of the head's weight."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return int(weight.shape[0])

    def trainable(self) -> list[nn.Parameter]:
        """Parameters of the head that want a gradient: its own weight, an adapter's, single rows."""
        rows = [] if self.rows is None else [self.rows.weight_KH]
        return [parameter for parameter in (*self.module.parameters(), *rows) if parameter.requires_grad]

    @property
    def is_frozen(self) -> bool:
        """True for a plain linear layer that is not trained, but for `rows`."""
        frozen = all(not parameter.requires_grad for parameter in self.module.parameters())
        return frozen and type(self.module) is nn.Linear

    def logits(self, hidden_CH: Tensor) -> Tensor:
        """Float32 logits [C, V]."""
        logits_CV: Tensor = self.module(hidden_CH).float()
        if self.rows is not None:
            rows_CK = linear(hidden_CH, self.rows.weight_KH.to(hidden_CH.dtype))
            logits_CV = logits_CV.index_copy_(1, self.rows.ids_K, rows_CK.float())  # in place: chunks are large
        if self.scale != 1.0:
            logits_CV = logits_CV * self.scale
        if self.softcap is not None:
            logits_CV = self.softcap * torch.tanh(logits_CV / self.softcap)
        return logits_CV


def _chunk_logprobs(head: Head, hidden_CH: Tensor, target_C: Tensor) -> Tensor:
    logits_CV = head.logits(hidden_CH)
    return logits_CV.gather(-1, target_C[:, None]).squeeze(-1) - logits_CV.logsumexp(-1)


class _FrozenHead(torch.autograd.Function):
    """Log-probs under a frozen linear head, and their gradient, from one pass over the logits.

    The gradient of a token's log-prob by its hidden state does not depend on what the loss will be:
    d log p(y) / dh = W_y - sum_v p(v) W_v (each row times scale * (1 - (logit / softcap)^2) where the model has
    them). The forward therefore keeps this direction, [N, H], while it has the chunk's softmax at hand, and the
    backward scales it: two matrix products with W in all, and no logits kept or made again.
    For rows that are trained, d log p(y) / dW_k = (1[y = k] - p(k)) h, likewise scaled: the factor is kept, [N, K].
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden_NH: Tensor,
        target_N: Tensor,
        head: Head,
        chunk: int,
        rows_KH: Tensor | None,
    ) -> Tensor:
        """Float32 log-probs [N]; `rows_KH` are the head's, so that autograd hands them their gradient."""
        wanted = hidden_NH.requires_grad or (rows_KH is not None and rows_KH.requires_grad)
        logprob_N = torch.empty(len(target_N), dtype=torch.float32, device=hidden_NH.device)
        direction_NH = torch.empty_like(hidden_NH if wanted else hidden_NH[:0])
        factor_NK = logprob_N.new_empty(len(direction_NH), 0 if rows_KH is None else len(rows_KH))
        for start in range(0, len(target_N), chunk):
            part = slice(start, start + chunk)
            logprob_N[part], slopes = _with_slopes(head, hidden_NH[part], target_N[part], wanted=wanted)
            if slopes is not None:
                direction_NH[part], factor_NK[part] = slopes
        if wanted:
            ctx.save_for_backward(direction_NH, factor_NK, *(() if rows_KH is None else (hidden_NH,)))
        return logprob_N

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad_N: Tensor
    ) -> tuple[Tensor, None, None, None, Tensor | None]:
        """Gradients of the hidden states, [N, H], and of the trained rows, [K, H]."""
        direction_NH, factor_NK, *hidden = ctx.saved_tensors  # type: ignore[attr-defined]
        grad_NH = direction_NH * grad_N[:, None].to(direction_NH.dtype)
        grad_KH = (factor_NK * grad_N[:, None]).T @ hidden[0].float() if hidden else None
        return grad_NH, None, None, None, grad_KH


def _with_slopes(
    head: Head, hidden_CH: Tensor, target_C: Tensor, *, wanted: bool
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Log-probs [C] and, where wanted, their gradients by the hidden states, [C, H], and what each of them adds to
    the gradients of the trained rows, in hidden states, [C, K] float32; works in the logits' memory."""
    weight_VH = head.module.weight
    assert isinstance(weight_VH, Tensor)
    logits_CV = head.logits(hidden_CH)
    target_C1 = target_C[:, None]
    chosen_C1 = logits_CV.gather(-1, target_C1)
    slope_CV = head.scale * (1 - (logits_CV / head.softcap) ** 2) if wanted and head.softcap is not None else None
    top_C1 = logits_CV.amax(-1, keepdim=True)
    odds_CV = logits_CV.sub_(top_C1).exp_()  # p(v) / p(top): divided by their sum only where it is small
    total_C1 = odds_CV.sum(-1, keepdim=True)
    logprob_C = (chosen_C1 - top_C1 - total_C1.log()).squeeze(-1)
    if not wanted:
        return logprob_C, None
    slope_C1: Tensor | float = head.scale
    if slope_CV is not None:
        slope_C1 = slope_CV.gather(-1, target_C1)
        odds_CV.mul_(slope_CV)
    elif head.scale != 1.0:
        total_C1 = total_C1 / head.scale
    factor_CK = hidden_CH.new_empty(len(hidden_CH), 0, dtype=torch.float32)
    chosen_CH = weight_VH[target_C] * slope_C1
    if head.rows is None:
        return logprob_C, (chosen_CH - (odds_CV.to(hidden_CH.dtype) @ weight_VH) / total_C1, factor_CK)
    is_row_CK = target_C1 == head.rows.ids_K
    factor_CK = is_row_CK * slope_C1 - odds_CV[:, head.rows.ids_K] / total_C1
    odds_CV[:, head.rows.ids_K] = 0
    chosen_CH = chosen_CH.masked_fill(is_row_CK.any(-1, keepdim=True), 0)
    from_rows_CH = factor_CK.to(hidden_CH.dtype) @ head.rows.weight_KH.to(hidden_CH.dtype)
    direction_CH = chosen_CH - (odds_CV.to(hidden_CH.dtype) @ weight_VH) / total_C1 + from_rows_CH
    return logprob_C, (direction_CH, factor_CK)


class _TrainableHead(torch.autograd.Function):
    """Log-probs under any head, trained or adapted: the backward recomputes each chunk under autograd."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden_NH: Tensor,
        target_N: Tensor,
        head: Head,
        chunk: int,
        *parameters: Tensor,
    ) -> Tensor:
        """Float32 log-probs [N]; `parameters` are the head's, so that autograd hands them their gradient."""
        chunks = zip(hidden_NH.split(chunk), target_N.split(chunk), strict=True)
        ctx.head, ctx.chunk = head, chunk  # type: ignore[attr-defined]
        ctx.save_for_backward(hidden_NH, target_N, *parameters)
        return torch.cat([_chunk_logprobs(head, hidden_CH, target_C) for hidden_CH, target_C in chunks])

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the hidden states and of every parameter of the head."""
        hidden_NH, target_N, *parameters = ctx.saved_tensors  # type: ignore[attr-defined]
        head, chunk = ctx.head, ctx.chunk  # type: ignore[attr-defined]
        grad_NH = torch.empty_like(hidden_NH)
        totals: list[Tensor] = [torch.zeros_like(parameter) for parameter in parameters]
        for start in range(0, len(target_N), chunk):
            part = slice(start, start + chunk)
            with torch.enable_grad():
                hidden_CH = hidden_NH[part].detach().requires_grad_()
                logprob_C = _chunk_logprobs(head, hidden_CH, target_N[part])
            grad_CH, *grads = torch.autograd.grad(logprob_C, (hidden_CH, *parameters), grad_N[part])
            grad_NH[part] = grad_CH
            for total, grad in zip(totals, grads, strict=True):
                total += grad
        return (grad_NH, None, None, None, *totals)


def token_logprobs(hidden_NH: Tensor, target_N: Tensor, head: Head, *, chunk_bytes: int | None = None) -> Tensor:
    """Log-prob of each target given the hidden state before it, [N], float32, in nats.

    Never holds more than `chunk_bytes` of float32 logits (and one more copy of a chunk while it works on it);
    None takes what suits the device.
    """
    if not len(target_N):
        return hidden_NH.sum(-1).float()  # empty, but still part of the graph
    allowed = chunk_bytes or CHUNK_BYTES.get(hidden_NH.device.type, CHUNK_BYTES["cpu"])
    chunk = max(1, min(len(target_N), allowed // (4 * head.vocabulary)))
    if not head.is_frozen:
        return _TrainableHead.apply(hidden_NH, target_N, head, chunk, *head.trainable())  # type: ignore[no-untyped-call, no-any-return]
    rows_KH = None if head.rows is None else head.rows.weight_KH
    return _FrozenHead.apply(hidden_NH, target_N, head, chunk, rows_KH)  # type: ignore[no-untyped-call, no-any-return]
