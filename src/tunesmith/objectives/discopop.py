"""DiscoPOP: a logistic loss that becomes an exponential one as the margin grows.

In: log-ratios of pairs. Out: the loss of each. Must not know: models, tokens, where the reference came from.

Source: Lu et al. 2024, "Discovering preference optimization algorithms with and for large language models",
arXiv:2406.08414, equation 5 (log-ratio modulated loss); beta from its appendix B.1.
Differs: the default temperature is 0.2, its appendix E's 0.05 (`discopop_loss` says what comes of that).

Shapes: P pairs, K = 2 answers, the chosen one first. Units: log-ratios in nats.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from tunesmith.objectives.base import Objective
from tunesmith.objectives.pairs import PLAIN, PairOptions, paired


def discopop_loss(logratio_PK: Tensor, *, beta: float = 0.05, temperature: float = 0.2) -> Tensor:
    """Loss of each pair, [P]: (1 - m) * -log sigmoid(x) + m * exp(-x), with m = sigmoid(x / temperature).

    arXiv:2406.08414, equation 5; x = beta * margin of log-ratios. It is not convex: under a temperature below 0.1023 it
    rises at x = 0, where training starts, from a minimum left of 0 to a hump right of it, so pairs are drawn the wrong
    way until something else moves them over the hump.
    """
    logits_P = beta * (logratio_PK[:, 0] - logratio_PK[:, 1])
    scaled_P = logits_P / temperature
    # one exponential of a sum: where x is far below 0, exp(-x) alone is infinite and m is 0
    exponential_P = (logsigmoid(scaled_P) - logits_P).exp()
    return (-scaled_P).sigmoid() * -logsigmoid(logits_P) + exponential_P


def discopop(beta: float, temperature: float, *, options: PairOptions = PLAIN) -> Objective:
    """The objective over trees of two branches, chosen first; one unit a pair."""
    return paired(
        "discopop",
        lambda pairs: discopop_loss(pairs.logratio_PK, beta=beta, temperature=temperature),
        beta=beta,
        options=options,
    )
