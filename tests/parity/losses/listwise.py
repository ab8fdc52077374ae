"""Rankings of k answers, choice by choice from the papers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.support.methods import Answer, Case, Example
from tunesmith.recipe.models import Lora, Source
from tunesmith.recipe.preferences import BestAgainstRestStage, PlackettLuceStage

BETA = 0.3


def reward(answer: Answer) -> Tensor:
    return BETA * (answer.policy.sum() - answer.reference.sum())


def slow_plackett_luce(examples: Sequence[Example]) -> Tensor:
    """-log prod_k exp(r_(k)) / sum_{j >= k} exp(r_(j)), Rafailov et al. 2023, equation 20, best first."""
    total = torch.zeros((), dtype=torch.float64)
    for example in examples:
        assert len(set(example.scores)) == len(example.scores), "the paper has no ties"
        order = sorted(range(len(example.answers)), key=lambda place: -example.scores[place])
        rewards = [reward(example.answers[place]) for place in order]
        probability = torch.ones((), dtype=torch.float64)
        for k in range(len(rewards)):
            probability = probability * torch.exp(rewards[k]) / sum(torch.exp(other) for other in rewards[k:])
        total = total - torch.log(probability)
    return total / len(examples)


def slow_best_against_rest(examples: Sequence[Example]) -> Tensor:
    """-log sigmoid(-log sum_{others} exp(r_other - r_best)), Chen et al. 2024, equation 11."""
    losses = []
    for example in examples:
        best = max(range(len(example.answers)), key=lambda place: example.scores[place])
        won = reward(example.answers[best])
        others = [reward(answer) for place, answer in enumerate(example.answers) if place != best]
        logit = -torch.log(torch.stack([torch.exp(other - won) for other in others]).sum())
        losses.append(torch.log(1 + torch.exp(-logit)))
    return sum(losses, torch.zeros((), dtype=torch.float64)) / len(examples)


def listwise(kind: type[PlackettLuceStage] | type[BestAgainstRestStage], **changes: Any) -> Any:
    values: dict[str, Any] = {"name": "ranks", "train": [Source(path="x")], "learning_rate": 2e-3, "batch_size": 4}
    return kind(**(values | {"forest_tokens": 90, "tuning": Lora(r=4), "beta": BETA} | changes))


EVEN_ORDERS = (math.log(6) + math.log(24)) / 2  # rows of 3 and 4 answers in turn: every order is as likely
EVEN_CHOICES = (math.log(3) + math.log(4)) / 2
CASES = [
    Case("plackett_luce", listwise(PlackettLuceStage), slow_plackett_luce, start=EVEN_ORDERS),
    Case("best_against_rest", listwise(BestAgainstRestStage), slow_best_against_rest, start=EVEN_CHOICES),
]
