"""AOT, paired and unpaired, quantile by quantile from the paper: each value finds its place by counting."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tests.parity.losses.anchored import logratio
from tests.parity.losses.dpo import minus_log_sigmoid
from tests.parity.losses.margins import settings
from tests.support.methods import Case, Example, SlowLoss
from tunesmith.recipe.preferences import AotStage, AotUnpairedStage

Sample = Callable[[Example], Tensor]


def rank(values: Sequence[Tensor], index: int) -> int:
    """How many values lie below the one at `index`; of equal ones the earlier counts as lower."""
    own = values[index].item()
    earlier = sum(value.item() == own for value in values[:index])
    return sum(value.item() < own for value in values) + earlier


def slow_transport(above: Sample, below: Sample, beta: float, smoothing: float = 0.0) -> SlowLoss:
    """Melnyk et al. 2024, section 3: the i-th smallest of one sample beside the i-th smallest of the other."""

    def loss(examples: Sequence[Example]) -> Tensor:
        u, v = [above(example) for example in examples], [below(example) for example in examples]
        total = torch.zeros((), dtype=torch.float64)
        for place in range(len(examples)):
            (high,) = [value for index, value in enumerate(u) if rank(u, index) == place]
            (low,) = [value for index, value in enumerate(v) if rank(v, index) == place]
            gap = beta * (high - low)
            total = total + (1 - smoothing) * minus_log_sigmoid(gap) + smoothing * minus_log_sigmoid(-gap)
        return total / len(examples)

    return loss


def policy_margin(example: Example) -> Tensor:
    return example.answers[0].policy.sum() - example.answers[1].policy.sum()


def reference_margin(example: Example) -> Tensor:
    return example.answers[0].reference.sum() - example.answers[1].reference.sum()


def slow_aot(beta: float, smoothing: float = 0.0) -> SlowLoss:
    return slow_transport(policy_margin, reference_margin, beta, smoothing)


def slow_aot_unpaired(beta: float, smoothing: float = 0.0) -> SlowLoss:
    return slow_transport(
        lambda example: logratio(example.answers[0]), lambda example: logratio(example.answers[1]), beta, smoothing
    )


AOT = {"beta": 0.3, "learning_rate": 5e-4}

CASES = [
    Case("aot", AotStage(**settings("aot", **AOT)), slow_aot(0.3), start=math.log(2)),
    Case(
        "aot, smoothed",
        AotStage(**settings("aot", label_smoothing=0.1, **AOT)),
        slow_aot(0.3, 0.1),
        start=math.log(2),
        golden=False,
    ),
    Case("aot_unpaired", AotUnpairedStage(**settings("aot", **AOT)), slow_aot_unpaired(0.3), start=math.log(2)),
    Case(
        "aot_unpaired, smoothed",
        AotUnpairedStage(**settings("aot", label_smoothing=0.1, **AOT)),
        slow_aot_unpaired(0.3, 0.1),
        start=math.log(2),
        golden=False,
    ),
]
