"""What a few methods read of a token's distribution besides its log-prob.

In: hidden states of the tokens before the trained ones, the LM head, the targets and their log-probs. Out: [N] values
by name. Must not know: objectives, trees, files.

Shapes: N trained tokens, C of them in a chunk, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tunesmith.engine.head import Head
from tunesmith.engine.logprobs import Extra, Tiling


def token_extras(
    hidden_NH: Tensor, target_N: Tensor, logprob_N: Tensor, head: Head, wants: Sequence[Extra]
) -> Mapping[Extra, Tensor]:
    """The wanted extras of each trained token, [N] float32 each, in nats."""
    found: dict[Extra, Tensor] = {}
    for name in wants:
        if not len(target_N):
            found[name] = logprob_N
        elif name == "mean":
            found[name] = _mean(hidden_NH, target_N, logprob_N, head)
        else:
            found[name] = _collision(hidden_NH.detach(), head)
    return found


def _mean(hidden_NH: Tensor, target_N: Tensor, logprob_N: Tensor, head: Head) -> Tensor:
    """1/V sum_v log p(v): the target's own log-prob, moved by how far its logit lies above the mean logit.

    Under a plain linear head the mean logit is one product with the mean of the head's rows; where something bends the
    logits or rows are trained apart, a chunk of logits is made at a time, and again in the backward pass.
    """
    if head.is_linear and head.softcap is None and head.rows is None:
        with torch.autocast(hidden_NH.device.type, enabled=False):
            # no float32 copy of the whole matrix: in half precision that is gigabytes
            mean_H = head.weight_VH.mean(0, dtype=torch.float32)
            above_N = (hidden_NH.float() * (head.weight_VH[target_N].float() - mean_H)).sum(-1)
            if head.bias_V is not None:
                above_N = above_N + (head.bias_V[target_N] - head.bias_V.mean()).float()
        return logprob_N - above_N * (head.scale / head.temperature)

    def chunk(hidden_CH: Tensor) -> Tensor:
        logits_CV = head.logits(hidden_CH)
        return logits_CV.mean(-1) - logits_CV.logsumexp(-1)

    parts = _tiling(head, len(target_N), hidden_NH.device.type).chunks(len(target_N))
    found = [checkpoint(chunk, hidden_NH[part], use_reentrant=False) for part in parts]
    return torch.cat([part for part in found if isinstance(part, Tensor)])


@torch.no_grad()
def _collision(hidden_NH: Tensor, head: Head) -> Tensor:
    """log sum_v p(v)^2, the log of the chance that two draws are equal."""
    parts = []
    for part in _tiling(head, len(hidden_NH), hidden_NH.device.type).chunks(len(hidden_NH)):
        logits_CV = head.logits(hidden_NH[part])
        parts.append((2 * logits_CV).logsumexp(-1) - 2 * logits_CV.logsumexp(-1))
    return torch.cat(parts)


def of_logits(logits_NV: Tensor, wants: Sequence[Extra]) -> dict[Extra, Tensor]:
    """The same from whole rows of logits: the slow way."""
    logprob_NV = logits_NV.float().log_softmax(-1)
    values: dict[Extra, Tensor] = {
        "mean": logprob_NV.mean(-1),
        "collision": (2 * logprob_NV.detach()).logsumexp(-1),
    }
    return {name: values[name] for name in wants}


def _tiling(head: Head, num_tokens: int, device: str) -> Tiling:
    return Tiling(
        max(1, Tiling.of(head, num_tokens, device).rows * 2048 // max(2048, head.vocabulary)), head.vocabulary
    )
