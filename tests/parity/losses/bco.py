"""BCO with its shift, and mixtures of losses, answer by answer from the papers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.support.methods import Answer, Case, Example, SlowLoss
from tunesmith.recipe.models import Lora, Source
from tunesmith.recipe.preferences import BcoStage, MixtureStage, MixtureWeights

SHORT: dict[str, Any] = {"train": [Source(path="x")], "batch_size": 4, "forest_tokens": 90, "tuning": Lora(r=4)}
# Many rewards came before: the shift hardly moves within a step, as finite differences, which move it, need.
BEFORE = {"reward_sum": 1500.0, "num_rewards": 5000.0}


def log_ratio(answer: Answer) -> Tensor:
    return answer.policy.sum() - answer.reference.sum()


def shift(examples: Sequence[Example], beta: float) -> Tensor:
    """delta: the mean of all rewards so far, a constant."""
    rewards = [beta * log_ratio(answer).detach() for example in examples for answer in example.answers]
    return (sum(rewards, torch.tensor(BEFORE["reward_sum"]))) / (len(rewards) + BEFORE["num_rewards"])


def classified(example: Example, beta: float, delta: Tensor) -> Tensor:
    """Cross-entropy of the classifier whose logit is reward - delta: chosen answers are 1, rejected ones 0."""
    won, lost = (torch.sigmoid(beta * log_ratio(answer) - delta) for answer in example.answers)
    return -torch.log(won) - torch.log(1 - lost)


def slow_bco(beta: float) -> SlowLoss:
    def loss(examples: Sequence[Example]) -> Tensor:
        delta = shift(examples, beta)
        return torch.stack([classified(example, beta, delta) for example in examples]).mean()

    return loss


def slow_mixture(beta: float, weights: MixtureWeights) -> SlowLoss:
    def one(example: Example, delta: Tensor) -> Tensor:
        won, lost = example.answers
        margin = beta * (log_ratio(won) - log_ratio(lost))
        per_token = log_ratio(won) / len(won.policy) - log_ratio(lost) / len(lost.policy)
        parts = [
            (weights.dpo, -torch.log(torch.sigmoid(margin))),
            (weights.bco, classified(example, beta, delta)),
            (weights.sft, -won.policy.mean()),
            (weights.hinge, torch.clamp(1 - margin, min=0)),
            (weights.ipo, (per_token - 1 / (2 * beta)) ** 2),
            (weights.apo_zero, 1 - torch.sigmoid(beta * log_ratio(won)) + torch.sigmoid(beta * log_ratio(lost))),
        ]
        return torch.stack([weight * part for weight, part in parts]).sum()

    def loss(examples: Sequence[Example]) -> Tensor:
        delta = shift(examples, beta)
        return torch.stack([one(example, delta) for example in examples]).mean()

    return loss


MPO = MixtureWeights()
ALL = MixtureWeights(dpo=0.5, bco=0.4, sft=0.3, hinge=0.2, ipo=0.05, apo_zero=0.6)
APART = MixtureWeights(dpo=0.7, bco=0.0, sft=0.2, hinge=0.0, ipo=0.0, apo_zero=0.4)
CASES = [
    Case("bco", BcoStage(name="bco", learning_rate=5e-3, beta=0.3, **SHORT), slow_bco(0.3), carried=BEFORE),
    Case(
        "mixture",
        MixtureStage(name="mixture", learning_rate=5e-3, beta=0.3, weights=MPO, **SHORT),
        slow_mixture(0.3, MPO),
        carried=BEFORE,
    ),
    Case(
        "mixture, all parts",
        MixtureStage(name="mixture", learning_rate=5e-3, beta=0.3, weights=ALL, **SHORT),
        slow_mixture(0.3, ALL),
        carried=BEFORE,
        golden=False,
    ),
    Case(
        "mixture, separable",
        MixtureStage(name="mixture", learning_rate=5e-3, beta=0.3, weights=APART, **SHORT),
        slow_mixture(0.3, APART),
        golden=False,
    ),
]
