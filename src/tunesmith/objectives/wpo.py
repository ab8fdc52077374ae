"""WPO: a pair counts as much as the policy would have written its answers itself.

In: log-probs with the collision of each token's distribution. Out: a weight a pair, without gradient.
Must not know: which loss is weighted.

Source: Zhou et al. 2024, arXiv:2406.11827, with sampled alignment: a token's log-prob is measured against the policy's
own expectation of it, log sum_v p(v)^2, and an answer's weight is the exponential of the mean over its tokens.

Shapes: N trained tokens, P pairs, K = 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tunesmith.engine.logprobs import Logprobs


def wpo_weights(logprobs: Logprobs) -> Tensor:
    """Weight of each pair, [P], in (0, 1]: the product of its answers' weights, at most 1."""
    with torch.no_grad():
        aligned_N = logprobs.logprob_N - logprobs.extras["collision"]
        mean_B = logprobs.per_branch(aligned_N) / logprobs.per_branch(torch.ones_like(aligned_N))
        return mean_B.view(-1, 2).sum(-1).exp().clamp(max=1.0)
