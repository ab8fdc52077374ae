"""DPO under other divergences (f-DPO) and with an offset (ODPO), pair by pair from the papers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tests.support.methods import Answer, Case, Example, SlowLoss
from tests.support.training import dpo_stage


def ratio(answer: Answer) -> Tensor:
    """u = policy(y|x) / reference(y|x)."""
    return torch.exp(answer.policy.sum() - answer.reference.sum())


def slow_f_dpo(beta: float, slope: Callable[[Tensor], Tensor]) -> SlowLoss:
    """-log sigmoid(beta f'(u_w) - beta f'(u_l)); `slope` is f' of Wang et al. 2023, table 1."""

    def loss(examples: Sequence[Example]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for example in examples:
            won, lost = (beta * slope(ratio(answer)) for answer in example.answers)
            total = total - torch.nn.functional.logsigmoid(won - lost)
        return total / len(examples)

    return loss


def slow_odpo(beta: float, alpha: float) -> SlowLoss:
    """-log sigmoid(r_w - r_l - alpha (score_w - score_l)), Amini et al. 2024, with the identity for their f."""

    def loss(examples: Sequence[Example]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for example in examples:
            won, lost = (beta * torch.log(ratio(answer)) for answer in example.answers)
            offset = alpha * (example.scores[0] - example.scores[1])
            total = total + torch.log1p(torch.exp(-(won - lost - offset)))
        return total / len(examples)

    return loss


LN2 = math.log(2)
# Rows of random log-probs are some nats from their reference: a small beta keeps the exponentials in sight. Those of a
# tiny model are a hundred nats away, where e^-log-ratio has no finite difference in float32; a unit test takes it.
CASES = [
    Case(
        "dpo, forward KL",
        dpo_stage(beta=0.01, divergence="forward_kl"),
        slow_f_dpo(0.01, lambda u: -1 / u),
        start=LN2,
        golden=False,
        is_slope=False,
    ),
    Case(
        "dpo, Jensen-Shannon",
        dpo_stage(beta=0.3, divergence="jensen_shannon"),
        slow_f_dpo(0.3, lambda u: torch.log(2 * u / (1 + u))),
        start=LN2,
        golden=False,
    ),
    Case(
        "dpo, alpha divergence",
        dpo_stage(beta=0.1, divergence="alpha", divergence_alpha=0.05),
        slow_f_dpo(0.1, lambda u: (1 - u**-0.05) / 0.05),
        start=LN2,
        golden=False,
    ),
    Case(
        "dpo, scored margins",
        dpo_stage(beta=0.3, margin="scores", margin_scale=0.5),
        slow_odpo(0.3, 0.5),
        golden=False,
    ),
]
