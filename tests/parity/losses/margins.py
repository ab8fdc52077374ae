"""Methods of one margin a pair, from their papers: robust DPO, hinge, IPO, EXO, length-normalized DPO, DiscoPOP."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.parity.losses.dpo import minus_log_sigmoid, reward_margin
from tests.support.methods import Answer, Case, Example, SlowLoss
from tunesmith.recipe.models import Lora, Source
from tunesmith.recipe.preferences import (
    DiscopopStage,
    ExoStage,
    HingeStage,
    IpoStage,
    RobustDpoStage,
    SigmoidNormStage,
)


def settings(method: str, **changes: Any) -> dict[str, Any]:
    """The values of a short stage."""
    values: dict[str, Any] = {"name": method, "train": [Source(path="x")], "learning_rate": 2e-3, "batch_size": 4}
    return values | {"forest_tokens": 90, "tuning": Lora(r=4)} | changes


def mean_over(loss_of: Callable[[Example], Tensor]) -> SlowLoss:
    """The mean of the examples' losses, one after another."""

    def loss(examples: Sequence[Example]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for example in examples:
            total = total + loss_of(example)
        return total / len(examples)

    return loss


def slow_robust(beta: float, flipped: float) -> SlowLoss:
    """Chowdhury et al. 2024, section 3.1: DPO's loss of the labels as given and as flipped, de-biased."""

    def loss(example: Example) -> Tensor:
        given = minus_log_sigmoid(reward_margin(example, beta))
        other_way = Example(example.answers[::-1])
        return ((1 - flipped) * given - flipped * minus_log_sigmoid(reward_margin(other_way, beta))) / (1 - 2 * flipped)

    return mean_over(loss)


def slow_hinge(gamma: float) -> SlowLoss:
    """Liu et al. 2023 (RSO), hinge-norm."""

    def loss(example: Example) -> Tensor:
        short = 1 - reward_margin(example, gamma)
        return short if short.item() > 0 else 0 * short

    return mean_over(loss)


def per_token(answer: Answer) -> Tensor:
    """Mean over the answer's tokens of log pi - log pi_ref."""
    return sum(answer.policy - answer.reference, torch.zeros((), dtype=torch.float64)) / len(answer.policy)


def slow_ipo(tau: float, *, is_mean: bool) -> SlowLoss:
    """Azar et al. 2023, equation 17: (h_pi(y_w, y_l) - 1 / (2 tau))^2."""

    def loss(example: Example) -> Tensor:
        won, lost = example.answers
        h = per_token(won) - per_token(lost) if is_mean else reward_margin(example, 1.0)
        return (h - 1 / (2 * tau)) ** 2

    return mean_over(loss)


def slow_exo(beta: float, epsilon: float) -> SlowLoss:
    """Ji et al. 2024, equation 16, K = 2: sum over the answers of q log(q / p), q a softmax written out."""

    def loss(example: Example) -> Tensor:
        raised = [torch.exp(beta * (answer.policy.sum() - answer.reference.sum())) for answer in example.answers]
        total = torch.zeros((), dtype=torch.float64)
        for each, p in zip(raised, (1 - epsilon, epsilon), strict=True):
            q = each / (raised[0] + raised[1])
            total = total + q * torch.log(q / p)
        return total

    return mean_over(loss)


def slow_sigmoid_norm(beta: float) -> SlowLoss:
    """Lambert et al. 2024 (Tulu 3): each log-ratio over its answer's length."""
    return mean_over(
        lambda example: minus_log_sigmoid(beta * per_token(example.answers[0]) - beta * per_token(example.answers[1]))
    )


def slow_discopop(beta: float, tau: float) -> SlowLoss:
    """Lu et al. 2024, equation 5."""

    def loss(example: Example) -> Tensor:
        x = reward_margin(example, beta)
        share = 1 / (1 + torch.exp(-x / tau))
        return (1 - share) * minus_log_sigmoid(x) + share * torch.exp(-x)

    return mean_over(loss)


ROBUST = {"beta": 0.3, "learning_rate": 5e-4}

CASES = [
    Case(
        "robust_dpo",
        RobustDpoStage(**settings("robust_dpo", label_smoothing=0.1, **ROBUST)),
        slow_robust(0.3, 0.1),
        start=math.log(2),
    ),
    Case(
        "robust_dpo, many flips",
        RobustDpoStage(**settings("robust_dpo", label_smoothing=0.4, **ROBUST)),
        slow_robust(0.3, 0.4),
        start=math.log(2),
        golden=False,
    ),
    Case("hinge", HingeStage(**settings("hinge", beta=0.2)), slow_hinge(0.2), start=1.0),
    Case("ipo", IpoStage(**settings("ipo", beta=0.5)), slow_ipo(0.5, is_mean=True), start=1.0),
    Case(
        "ipo, sum",
        IpoStage(**settings("ipo", beta=0.1, normalization="sum", learning_rate=5e-4)),
        slow_ipo(0.1, is_mean=False),
        start=25.0,
    ),
    Case(
        "exo",
        ExoStage(**settings("exo", beta=0.3, label_smoothing=1e-3)),
        slow_exo(0.3, 1e-3),
        start=math.log(0.5) - 0.5 * math.log(1e-3 * (1 - 1e-3)),
    ),
    Case(
        "sigmoid_norm",
        SigmoidNormStage(**settings("sigmoid_norm", beta=5.0)),
        slow_sigmoid_norm(5.0),
        start=math.log(2),
    ),
    Case(
        "discopop",
        DiscopopStage(**settings("discopop", beta=0.05, temperature=0.05)),
        slow_discopop(0.05, 0.05),
        start=0.5 * math.log(2) + 0.5,
    ),
    Case(
        "discopop, wide",
        DiscopopStage(**settings("discopop", beta=0.3, temperature=0.5)),
        slow_discopop(0.3, 0.5),
        start=0.5 * math.log(2) + 0.5,
    ),
]
