"""AlphaPO: SimPO with another shape of the reward.

In: the figures of pairs. Out: the loss of each. Must not know: models, tokens.

Source: Gupta et al. 2025, arXiv:2501.03884: the reward (1 - p^-alpha) / alpha of an answer's length-normalized
probability p, and the loss of section 3 with SimPO's beta and gamma. The defaults are table 3's for Mistral-Instruct,
which gives gamma / beta, 0.1.

Shapes: P pairs, K = 2. Units: mean log-probs in nats a token.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.nn.functional import logsigmoid

from tunesmith.objectives.base import Objective, Sum
from tunesmith.objectives.log_odds import capped_expm1
from tunesmith.objectives.pairs import PLAIN, PairOptions, Pairs, paired, reward_metrics


def shaped(mean: Tensor, alpha: float) -> Tensor:
    """(1 - p^-alpha) / alpha from the mean log-prob log p; log p itself where alpha is 0. The shape stays."""
    return mean if alpha == 0 else -capped_expm1(-alpha * mean) / alpha


def alphapo_loss(
    mean_chosen_P: Tensor, mean_rejected_P: Tensor, *, beta: float = 2.5, gamma: float = 0.25, alpha: float = 0.25
) -> Tensor:
    """Loss of each pair, [P], from the mean log-probs of its answers' tokens, each [P].

    -log sigmoid(beta * (shaped chosen - shaped rejected) - gamma).
    Differs: p^-alpha past e^30 goes on along its tangent.
    """
    return -logsigmoid(beta * (shaped(mean_chosen_P, alpha) - shaped(mean_rejected_P, alpha)) - gamma)


def alphapo(beta: float, gamma: float, alpha: float, *, options: PairOptions = PLAIN) -> Objective:
    """The objective over trees of two branches, chosen first; one unit a pair."""

    def loss(pairs: Pairs) -> Tensor:
        return alphapo_loss(pairs.mean_PK[:, 0], pairs.mean_PK[:, 1], beta=beta, gamma=gamma, alpha=alpha)

    def metrics(pairs: Pairs) -> Mapping[str, Sum]:
        return reward_metrics(beta * shaped(pairs.mean_PK, alpha), pairs.tokens_PK)

    return paired("alphapo", loss, beta=beta, options=options, needs_reference=False, more_metrics=metrics)
