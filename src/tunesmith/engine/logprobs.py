"""Log-probs of trained tokens: a chunk of logits at a time is made, read and dropped.

In: hidden states of the tokens before the trained ones, the LM head, the targets. Out: float32 log-probs with gradient.
Must not know: objectives, what a tree means, files.

Shapes: N trained tokens, C of them in a chunk, H hidden size, V vocabulary, B branches.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

CHUNK_BYTES = 128 * 2**20
"""Float32 logits alive at a time: large enough for full-rate matrix products, small beside any model's activations."""


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
    """The LM head and what the model does to its output: logits = softcap * tanh(scale * head(h) / softcap)."""

    module: nn.Module
    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, model: PreTrainedModel) -> Head:
        """The head of a Hugging Face causal model: Cohere multiplies, Granite divides, Gemma 2 soft-caps its logits."""
        config = model.config.get_text_config().to_dict()
        scale = float(config.get("logit_scale") or 1.0) / float(config.get("logits_scaling") or 1.0)
        return cls(model.get_output_embeddings(), scale, config.get("final_logit_softcapping"))

    @property
    def vocabulary(self) -> int:
        """V: rows of the head's weight."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return int(weight.shape[0])

    def trainable(self) -> list[nn.Parameter]:
        """Parameters of the head that want a gradient: its own weight, or an adapter's."""
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    def logits(self, hidden_CH: Tensor) -> Tensor:
        """Float32 logits [C, V]."""
        logits_CV: Tensor = self.module(hidden_CH).float()
        if self.scale != 1.0:
            logits_CV = logits_CV * self.scale
        if self.softcap is not None:
            logits_CV = self.softcap * torch.tanh(logits_CV / self.softcap)
        return logits_CV


def _chunk_logprobs(head: Head, hidden_CH: Tensor, target_C: Tensor) -> Tensor:
    logits_CV = head.logits(hidden_CH)
    return logits_CV.gather(-1, target_C[:, None]).squeeze(-1) - logits_CV.logsumexp(-1)


def _frozen_chunk_gradient(
    head: Head, grad_CV: Tensor, logits_CV: Tensor | None, weight_VH: Tensor, dtype: torch.dtype
) -> Tensor:
    """Gradient [C, H] of the hidden states, from that of the final logits; consumes grad_CV."""
    if head.softcap is not None:
        assert logits_CV is not None
        grad_CV.mul_(1 - (logits_CV / head.softcap) ** 2)
    if head.scale != 1.0:
        grad_CV.mul_(head.scale)
    return grad_CV.to(dtype) @ weight_VH


class _FrozenHead(torch.autograd.Function):
    """Log-probs under a frozen linear head. Backward: dlogits = g * (onehot - softmax), dh = dlogits @ W.

    Logits are recomputed chunk by chunk in the backward; where all trained tokens fit into one chunk, its
    softmax is kept instead, which is the same memory and saves a matrix product.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, hidden_NH: Tensor, target_N: Tensor, head: Head, chunk: int
    ) -> Tensor:
        """Float32 log-probs [N]."""
        keep = hidden_NH.shape[0] <= chunk and head.softcap is None and hidden_NH.requires_grad
        logprobs: list[Tensor] = []
        kept: list[Tensor] = []
        for hidden_CH, target_C in zip(hidden_NH.split(chunk), target_N.split(chunk), strict=True):
            logits_CV = head.logits(hidden_CH)
            lse_C = logits_CV.logsumexp(-1)
            logprobs.append(logits_CV.gather(-1, target_C[:, None]).squeeze(-1) - lse_C)
            if keep:
                kept.append(logits_CV.sub_(lse_C[:, None]).exp_())
        ctx.head, ctx.chunk = head, chunk  # type: ignore[attr-defined]
        ctx.save_for_backward(hidden_NH, target_N, *kept)
        return torch.cat(logprobs)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad_N: Tensor) -> tuple[Tensor, None, None, None]:
        """Gradient of the hidden states, [N, H]."""
        hidden_NH, target_N, *kept = ctx.saved_tensors  # type: ignore[attr-defined]
        head, chunk = ctx.head, ctx.chunk  # type: ignore[attr-defined]
        weight_VH = head.module.weight
        grad_NH = torch.empty_like(hidden_NH)
        for start in range(0, len(target_N), chunk):
            part = slice(start, start + chunk)
            target_C, grad_C = target_N[part, None], grad_N[part, None]
            logits_CV = None
            if kept:
                softmax_CV = kept[0].mul(-grad_C)  # kept[0] stays whole for a second backward
            else:
                logits_CV = head.logits(hidden_NH[part])
                softmax_CV = logits_CV.softmax(-1).mul_(-grad_C)
            softmax_CV.scatter_add_(-1, target_C, grad_C)
            grad_NH[part] = _frozen_chunk_gradient(head, softmax_CV, logits_CV, weight_VH, hidden_NH.dtype)
        return grad_NH, None, None, None


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


def token_logprobs(hidden_NH: Tensor, target_N: Tensor, head: Head, *, chunk_bytes: int = CHUNK_BYTES) -> Tensor:
    """Log-prob of each target given the hidden state before it, [N], float32, in nats.

    Never holds more than `chunk_bytes` of float32 logits (and one more copy of a chunk while it works on it).
    """
    if not len(target_N):
        return hidden_NH.sum(-1).float()  # empty, but still part of the graph
    chunk = max(1, min(len(target_N), chunk_bytes // (4 * head.vocabulary)))
    parameters = head.trainable()
    if parameters or type(head.module) is not nn.Linear:
        return _TrainableHead.apply(hidden_NH, target_N, head, chunk, *parameters)  # type: ignore[no-untyped-call, no-any-return]
    return _FrozenHead.apply(hidden_NH, target_N, head, chunk)  # type: ignore[no-untyped-call, no-any-return]
