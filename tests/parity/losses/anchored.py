"""Methods that see each answer by itself: NCA, SPPO, APO; answer by answer from their papers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tests.parity.losses.margins import mean_over, settings
from tests.support.methods import Answer, Case, Example, SlowLoss
from tunesmith.recipe.preferences import ApoDownStage, ApoZeroStage, NcaStage, SppoStage


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def logratio(answer: Answer) -> Tensor:
    return answer.policy.sum() - answer.reference.sum()


def slow_nca(beta: float) -> SlowLoss:
    """Chen et al. 2024, section 4.1: sum_i [w_i log s(r_i) + 1/K log s(-r_i)], K = 2, w = (1, 0)."""

    def loss(example: Example) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for answer, weight in zip(example.answers, (1.0, 0.0), strict=True):
            reward = beta * logratio(answer)
            total = total + weight * torch.log(sigmoid(reward)) + 1 / 2 * torch.log(sigmoid(-reward))
        return -total

    return mean_over(loss)


def slow_sppo(eta: float) -> SlowLoss:
    """Wu et al. 2024, equation 4.7: (log-ratio - eta (P - 1/2))^2 of both answers, P = 1 and 0."""

    def loss(example: Example) -> Tensor:
        won, lost = example.answers
        return (logratio(won) - eta * (1 - 0.5)) ** 2 + (logratio(lost) - eta * (0 - 0.5)) ** 2

    return mean_over(loss)


def slow_apo_zero(beta: float) -> SlowLoss:
    """D'Oosterlinck et al. 2024, equation 7, and the constant 1."""

    def loss(example: Example) -> Tensor:
        won, lost = (beta * logratio(answer) for answer in example.answers)
        return -sigmoid(won) + sigmoid(lost) + 1

    return mean_over(loss)


def slow_apo_down(beta: float) -> SlowLoss:
    """D'Oosterlinck et al. 2024, equation 8, and the constant 1."""

    def loss(example: Example) -> Tensor:
        won, lost = (beta * logratio(answer) for answer in example.answers)
        return sigmoid(won) - sigmoid(won - lost) + 1

    return mean_over(loss)


CASES = [
    Case("nca", NcaStage(**settings("nca", beta=0.3)), slow_nca(0.3), start=2 * math.log(2)),
    Case("sppo", SppoStage(**settings("sppo", beta=0.1, learning_rate=5e-4)), slow_sppo(10.0), start=50.0),
    Case("apo_zero", ApoZeroStage(**settings("apo_zero", beta=0.2)), slow_apo_zero(0.2), start=1.0),
    Case("apo_down", ApoDownStage(**settings("apo_down", beta=0.2)), slow_apo_down(0.2), start=1.0),
]
