"""ORPO, SimPO, CPO and AlphaPO, pair by pair from the papers: probabilities as they stand, in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.support.methods import Answer, Case, Example, SlowLoss
from tunesmith.recipe.models import Lora, Source
from tunesmith.recipe.preferences import AlphapoStage, CpoStage, OrpoStage, SimpoStage

SHORT: dict[str, Any] = {"train": [Source(path="x")], "batch_size": 4, "forest_tokens": 90, "tuning": Lora(r=4)}


def mean_over(loss: Callable[[Example], Tensor]) -> SlowLoss:
    def step(examples: Sequence[Example]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for example in examples:
            total = total + loss(example)
        return total / len(examples)

    return step


def per_token(answer: Answer) -> Tensor:
    """log P(y|x) = 1/m sum_t log P(y_t|x, y_<t), ORPO's equation 3 and the 1/|y| of SimPO's equation 6."""
    return answer.policy.sum() / len(answer.policy)


def minus_log_sigmoid(x: Tensor) -> Tensor:
    return torch.log1p(torch.exp(-x))


def slow_orpo(lambda_: float) -> SlowLoss:
    def loss(example: Example) -> Tensor:
        won, lost = (torch.exp(per_token(answer)) for answer in example.answers)
        odds_won, odds_lost = won / (1 - won), lost / (1 - lost)
        return -torch.log(won) - lambda_ * torch.log(torch.sigmoid(torch.log(odds_won / odds_lost)))

    return mean_over(loss)


def slow_simpo(beta: float, gamma: float) -> SlowLoss:
    def loss(example: Example) -> Tensor:
        won, lost = example.answers
        return minus_log_sigmoid(beta * per_token(won) - beta * per_token(lost) - gamma)

    return mean_over(loss)


def slow_cpo(beta: float, sft: float, smoothing: float = 0.0) -> SlowLoss:
    def loss(example: Example) -> Tensor:
        won, lost = example.answers
        margin = beta * won.policy.sum() - beta * lost.policy.sum()
        prefer = (1 - smoothing) * minus_log_sigmoid(margin) + smoothing * minus_log_sigmoid(-margin)
        return prefer - sft * per_token(won)

    return mean_over(loss)


def slow_alphapo(beta: float, gamma: float, alpha: float) -> SlowLoss:
    def reward(answer: Answer) -> Tensor:
        return beta * (1 - torch.exp(per_token(answer)) ** -alpha) / alpha

    def loss(example: Example) -> Tensor:
        won, lost = example.answers
        return minus_log_sigmoid(reward(won) - reward(lost) - gamma)

    return mean_over(loss)


CASES = [
    Case("orpo", OrpoStage(name="orpo", learning_rate=5e-3, beta=0.5, **SHORT), slow_orpo(0.5)),
    Case(
        "orpo, without odds", OrpoStage(name="orpo", learning_rate=5e-3, beta=0.0, **SHORT), slow_orpo(0), golden=False
    ),
    Case("simpo", SimpoStage(name="simpo", learning_rate=5e-3, beta=2.0, gamma=1.0, **SHORT), slow_simpo(2.0, 1.0)),
    Case("cpo", CpoStage(name="cpo", learning_rate=5e-3, beta=0.1, **SHORT), slow_cpo(0.1, 1.0)),
    Case(
        "cpo, smoothed, without SFT",
        CpoStage(name="cpo", learning_rate=5e-3, beta=0.1, label_smoothing=0.1, sft_weight=0.0, **SHORT),
        slow_cpo(0.1, 0.0, 0.1),
        golden=False,
    ),
    Case(
        "alphapo",
        AlphapoStage(name="alphapo", learning_rate=5e-3, beta=2.5, gamma=0.25, alpha=0.25, **SHORT),
        slow_alphapo(2.5, 0.25, 0.25),
    ),
    Case(
        "alphapo, bent the other way",
        AlphapoStage(name="alphapo", learning_rate=5e-3, beta=2.5, gamma=0.25, alpha=-0.5, **SHORT),
        slow_alphapo(2.5, 0.25, -0.5),
        golden=False,
    ),
    Case(
        "alphapo, unbent",
        AlphapoStage(name="alphapo", learning_rate=5e-3, beta=2.5, gamma=0.25, alpha=0.0, **SHORT),
        slow_simpo(2.5, 0.25),
        golden=False,
    ),
]
