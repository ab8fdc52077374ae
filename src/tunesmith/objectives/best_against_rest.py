"""The best of k answers against all others, which are not ordered among themselves.

In: rows of answers with scores. Out: the loss of each row. Must not know: models, tokens, where scores came from.

Source: S-DPO, Chen et al. 2024, arXiv:2406.09215; it is the first choice of Plackett-Luce.

Shapes: G rows, K answers. Units: rewards in nats.
"""

from __future__ import annotations

from torch import Tensor

from tunesmith.objectives.base import Objective
from tunesmith.objectives.rankings import Rankings, choice_loss, ranked


def best_against_rest_loss(reward_GK: Tensor, beats_GKK: Tensor, is_best_GK: Tensor) -> Tensor:
    """Loss of each row, [G]: -log of the best answer's share of the softmax over all k rewards.

    The loss of Chen et al. 2024 (arXiv:2406.09215), -log sigmoid(-log sum_j exp(r_j - r_best)), is the same number.
    Differs: where several answers share the highest score, each competes with the lower ones alone, and the row's loss
    is their mean.
    """
    return (choice_loss(reward_GK, beats_GKK) * is_best_GK).sum(-1) / is_best_GK.sum(-1)


def best_against_rest(beta: float) -> Objective:
    """The objective over trees with a score for every branch; one unit a row."""

    def loss(rows: Rankings) -> Tensor:
        return best_against_rest_loss(beta * rows.logratio_GK, rows.beats_GKK, rows.is_best_GK)

    return ranked("best_against_rest", loss, beta=beta)
