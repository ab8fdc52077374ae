"""KTO and unpaired BCO, answer by answer from the papers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.support.methods import Case, Example, SlowLoss
from tunesmith.recipe.models import Lora, Source
from tunesmith.recipe.preferences import BcoUnpairedStage, KtoStage


def log_ratio(example: Example, answer: int = 0) -> Tensor:
    """log pi_theta(y|x) - log pi_ref(y|x)."""
    return example.answers[answer].policy.sum() - example.answers[answer].reference.sum()


def slow_kto(beta: float, desirable: float = 1.0, undesirable: float = 1.0) -> SlowLoss:
    """E[lambda_y - v(x, y)], Ethayarajh et al. 2024, equation 8."""

    def loss(examples: Sequence[Example]) -> Tensor:
        drifts = [float(log_ratio(example, 1).detach()) for example in examples]
        z0 = max(0.0, sum(drifts) / len(drifts))
        total = torch.zeros((), dtype=torch.float64)
        for example in examples:
            r = log_ratio(example)
            if example.label:
                total = total + desirable - desirable / (1 + torch.exp(-beta * (r - z0)))
            else:
                total = total + undesirable - undesirable / (1 + torch.exp(-beta * (z0 - r)))
        return total / len(examples)

    return loss


def slow_bco(
    beta: float,
    desirable: float = 1.0,
    undesirable: float = 1.0,
    before: Callable[[bool], tuple[float, float]] = lambda label: (0.0, 0.0),
) -> SlowLoss:
    """-log sigmoid(+-(r - delta)), Jung et al. 2024; `before(label)`: sum and number of earlier rewards."""

    def loss(examples: Sequence[Example]) -> Tensor:
        means = []
        for label in (True, False):
            total, number = before(label)
            for example in examples:
                if example.label == label:
                    total, number = total + beta * float(log_ratio(example).detach()), number + 1
            means.append(total / number)
        delta = (means[0] + means[1]) / 2
        losses = []
        for example in examples:
            logit = beta * log_ratio(example) - delta
            if example.label:
                losses.append(-desirable * torch.log(1 / (1 + torch.exp(-logit))))
            else:
                losses.append(-undesirable * torch.log(1 - 1 / (1 + torch.exp(-logit))))
        return torch.stack(losses).sum() / len(examples)

    return loss


def kto_stage(**changes: Any) -> KtoStage:
    values: dict[str, Any] = {"name": "kto", "train": [Source(path="x")], "learning_rate": 5e-3, "batch_size": 4}
    return KtoStage(**(values | {"forest_tokens": 90, "tuning": Lora(r=4), "beta": 0.3} | changes))


def bco_stage(**changes: Any) -> BcoUnpairedStage:
    values: dict[str, Any] = {"name": "bco", "train": [Source(path="x")], "learning_rate": 5e-3, "batch_size": 4}
    return BcoUnpairedStage(**(values | {"forest_tokens": 90, "tuning": Lora(r=4), "beta": 0.3} | changes))


CASES = [
    Case("kto", kto_stage(), slow_kto(0.3), start=0.5),
    Case(
        "kto, weighted",
        kto_stage(desirable_weight=1.5, undesirable_weight=0.7),
        slow_kto(0.3, 1.5, 0.7),
        golden=False,
    ),
    # the shift is held constant: finite differences would move it (beside many earlier rewards they hardly do)
    Case("bco_unpaired", bco_stage(), slow_bco(0.3), start=math.log(2), is_slope=False),
    Case(
        "bco_unpaired, later",
        bco_stage(desirable_weight=1.5, undesirable_weight=0.7),
        slow_bco(0.3, 1.5, 0.7, before=lambda label: (900.0, 4000.0) if label else (-500.0, 3000.0)),
        carried={"reward_desirable": 900, "num_desirable": 4000, "reward_undesirable": -500, "num_undesirable": 3000},
        golden=False,
    ),
]
