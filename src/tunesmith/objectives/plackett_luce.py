"""DPO over rankings: the order of k answers, best first, is to be likely under the Plackett-Luce model.

In: rows of answers with scores. Out: the loss of each row. Must not know: models, tokens, where scores came from.

Source: Rafailov et al. 2023, arXiv:2305.18290, appendix A.3.

Shapes: G rows, K answers. Units: rewards in nats.
"""

from __future__ import annotations

from torch import Tensor

from tunesmith.objectives.base import Objective
from tunesmith.objectives.rankings import Rankings, choice_loss, ranked


def plackett_luce_loss(reward_GK: Tensor, beats_GKK: Tensor) -> Tensor:
    """Loss of each row, [G]: -log of the ranking's probability, Rafailov et al. 2023 (arXiv:2305.18290), appendix A.3.

    reward_GK: beta * log pi/pi_ref of whole answers; beats_GKK: [g, i, j] where answer i stands above answer j.
    With two answers this is DPO's loss. Differs: answers with equal scores do not compete with one another (the paper
    knows no ties); each is chosen before all that it beats.
    """
    return choice_loss(reward_GK, beats_GKK).sum(-1)


def plackett_luce(beta: float) -> Objective:
    """The objective over trees with a score for every branch; one unit a row."""

    def loss(rows: Rankings) -> Tensor:
        return plackett_luce_loss(beta * rows.logratio_GK, rows.beats_GKK)

    return ranked("plackett_luce", loss, beta=beta)
