"""Length-normalized DPO: log-ratios per token, so that a long answer has no more to win than a short one.

In: log-ratios of pairs, per token. Out: the loss of each. Must not know: models, where the reference came from.

Source: Lambert et al. 2024, "Tulu 3", arXiv:2411.15124, section 5 (length-normalized DPO).

Shapes: P pairs, K = 2 answers, the chosen one first. Units: mean log-ratios in nats per token.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from tunesmith.objectives.base import Objective
from tunesmith.objectives.pairs import PLAIN, PairOptions, paired, reward_metrics


def sigmoid_norm_loss(mean_logratio_PK: Tensor, *, beta: float = 5.0) -> Tensor:
    """Loss of each pair, [P], from log-ratios per token: -log sigmoid(beta * their margin) (arXiv:2411.15124)."""
    return -logsigmoid(beta * (mean_logratio_PK[:, 0] - mean_logratio_PK[:, 1]))


def sigmoid_norm(beta: float, *, options: PairOptions = PLAIN) -> Objective:
    """The objective over trees of two branches, chosen first; one unit a pair."""
    return paired(
        "sigmoid_norm",
        lambda pairs: sigmoid_norm_loss(pairs.mean_logratio_PK, beta=beta),
        beta=beta,
        options=options,
        more_metrics=lambda pairs: reward_metrics(beta * pairs.mean_logratio_PK, pairs.tokens_PK),
    )
