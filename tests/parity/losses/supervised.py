"""Maximum likelihood, token by token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.support.methods import Case, Example, SlowLoss
from tests.support.training import completion_stage, sft_stage


def slow_nll(smoothing: float = 0.0) -> SlowLoss:
    """Minus the mean log-prob of all trained tokens, each counting its weight, against a target that is spread by
    `smoothing` over the vocabulary (Szegedy et al. 2016, section 7)."""

    def loss(examples: Sequence[Example]) -> Tensor:
        total, count = torch.zeros((), dtype=torch.float64), 0.0
        for example in examples:
            for answer in example.answers:
                for own, mean, weight in zip(answer.policy, answer.mean, answer.weights.tolist(), strict=True):
                    cross_entropy = -(1 - smoothing) * own - smoothing * mean
                    total = total + weight * cross_entropy
                    count += weight
        return total / count

    return loss


CASES = [
    Case("sft", sft_stage(), slow_nll(), golden=False),
    Case("sft, smoothed", sft_stage(label_smoothing=0.1), slow_nll(0.1)),
    Case("completion", completion_stage(), slow_nll(), golden=False),
    Case("completion, smoothed", completion_stage(label_smoothing=0.2), slow_nll(0.2), golden=False),
]
