"""DPO and its label smoothing, pair by pair from the papers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tests.support.methods import Case, Example, SlowLoss
from tests.support.training import dpo_stage


def reward_margin(example: Example, beta: float) -> Tensor:
    """beta * (log-ratio of y_w - log-ratio of y_l), Rafailov et al. 2023, the argument of equation 7's sigmoid."""
    won, lost = example.answers
    return beta * ((won.policy.sum() - won.reference.sum()) - (lost.policy.sum() - lost.reference.sum()))


def minus_log_sigmoid(x: Tensor) -> Tensor:
    """log(1 + exp(-x))."""
    return torch.log1p(torch.exp(-x))


def slow_dpo(beta: float, smoothing: float = 0.0) -> SlowLoss:
    def loss(examples: Sequence[Example]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for example in examples:
            u = reward_margin(example, beta)
            total = total + (1 - smoothing) * minus_log_sigmoid(u) + smoothing * minus_log_sigmoid(-u)
        return total / len(examples)

    return loss


CASES = [
    # its golden curve is that of the label smoothing below, which the first releases wrote
    Case("dpo", dpo_stage(beta=0.3), slow_dpo(0.3), start=math.log(2), golden=False),
    Case(
        "dpo, smoothed", dpo_stage(beta=0.3, label_smoothing=0.1), slow_dpo(0.3, 0.1), start=math.log(2), golden=False
    ),
]
