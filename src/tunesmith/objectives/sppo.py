"""Self-play preference optimization with hard preferences: each log-ratio is drawn to a target of its own.

In: log-ratios of pairs. Out: the loss of each. Must not know: models, tokens, where the reference came from.

Source: Wu et al. 2024, "Self-play preference optimization for language model alignment", arXiv:2405.00675, equation
4.7, where the chosen answer wins with probability 1 and the rejected one with 0.

Shapes: P pairs, K = 2 answers, the chosen one first. Units: log-ratios in nats.
"""

from __future__ import annotations

from torch import Tensor

from tunesmith.objectives.base import Objective
from tunesmith.objectives.pairs import PLAIN, PairOptions, paired


def sppo_loss(logratio_PK: Tensor, *, beta: float = 1e-3) -> Tensor:
    """Loss of each pair, [P]: (chosen log-ratio - 1 / (2 beta))^2 + (rejected log-ratio + 1 / (2 beta))^2.

    arXiv:2405.00675, equation 4.7, summed over the two answers; beta is 1 / eta of the paper.
    Differs: the preferences are the data's, certain, and no new answers are sampled between rounds; the authors' code
    takes the mean of the two answers, half of this.
    """
    target_K = logratio_PK.new_tensor([0.5, -0.5]) / beta
    return (logratio_PK - target_K).square().sum(-1)


def sppo(beta: float, *, options: PairOptions = PLAIN) -> Objective:
    """The objective over trees of two branches, chosen first; one unit a pair."""
    return paired("sppo", lambda pairs: sppo_loss(pairs.logratio_PK, beta=beta), beta=beta, options=options)
