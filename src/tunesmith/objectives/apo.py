"""Anchored preference optimization: says of each answer, not of the margin alone, where its likelihood is to go.

In: log-ratios of pairs. Out: the loss of each. Must not know: models, tokens, where the reference came from.

Source: D'Oosterlinck et al. 2024, "Anchored preference optimization and contrastive revisions", arXiv:2408.06266,
equation 7 (zero) and equation 8 (down).

Shapes: P pairs, K = 2 answers, the chosen one first. Units: log-ratios in nats.
"""

from __future__ import annotations

from torch import Tensor

from tunesmith.objectives.base import Objective
from tunesmith.objectives.pairs import PLAIN, PairOptions, paired


def apo_zero_loss(logratio_PK: Tensor, *, beta: float = 0.1) -> Tensor:
    """Loss of each pair, [P], in (0, 2): 1 - s(r_w) + s(r_l) (arXiv:2408.06266, equation 7).

    s: the sigmoid; r = beta * log-ratio of the chosen (w) and the rejected (l) answer.
    Differs: 1 is added, which no gradient sees, so that the loss is above 0.
    """
    likely_PK = (beta * logratio_PK).sigmoid()
    return 1 - likely_PK[:, 0] + likely_PK[:, 1]


def apo_down_loss(logratio_PK: Tensor, *, beta: float = 0.1) -> Tensor:
    """Loss of each pair, [P], in (0, 2): s(r_w) + 1 - s(r_w - r_l) (arXiv:2408.06266, equation 8).

    Differs: 1 is added, as in `apo_zero_loss`.
    """
    chosen_P, rejected_P = beta * logratio_PK[:, 0], beta * logratio_PK[:, 1]
    return chosen_P.sigmoid() + 1 - (chosen_P - rejected_P).sigmoid()


def apo_zero(beta: float, *, options: PairOptions = PLAIN) -> Objective:
    """APO-zero over trees of two branches, chosen first; one unit a pair."""
    return paired("apo_zero", lambda pairs: apo_zero_loss(pairs.logratio_PK, beta=beta), beta=beta, options=options)


def apo_down(beta: float, *, options: PairOptions = PLAIN) -> Objective:
    """APO-down over trees of two branches, chosen first; one unit a pair."""
    return paired("apo_down", lambda pairs: apo_down_loss(pairs.logratio_PK, beta=beta), beta=beta, options=options)
