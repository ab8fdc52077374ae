"""What a recipe may change about a paired method, pair by pair from the papers: LD-DPO, WPO, RPO, weights of pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.parity.losses.dpo import minus_log_sigmoid
from tests.support.methods import Answer, Case, Example, SlowLoss
from tests.support.training import dpo_stage
from tunesmith.recipe.models import Lora, Source
from tunesmith.recipe.preferences import IpoStage, ReferenceUpdate, SimpoStage

BETA = 0.3
SETTINGS: dict[str, Any] = {
    "name": "modified",
    "train": [Source(path="x")],
    "learning_rate": 5e-4,
    "batch_size": 4,
    "forest_tokens": 90,
    "tuning": Lora(r=4),
}

PairLoss = Callable[[Example], Tensor]


def log_ratio(answer: Answer, public: int | None = None, alpha: float = 1.0) -> Tensor:
    """log pi(y|x) - log pi_ref(y|x); the tokens behind the `public` first count alpha (Liu et al. 2024, equation 10:
    the likelihood of the excess length is raised to the power alpha, in policy and reference)."""
    total = torch.zeros((), dtype=torch.float64)
    for place in range(len(answer.policy)):
        counts = 1.0 if public is None or place < public else alpha
        total = total + counts * (answer.policy[place] - answer.reference[place])
    return total


def dpo_pair(example: Example) -> Tensor:
    won, lost = example.answers
    return minus_log_sigmoid(BETA * (log_ratio(won) - log_ratio(lost)))


def ld_pair(alpha: float) -> PairLoss:
    def loss(example: Example) -> Tensor:
        won, lost = example.answers
        public = min(len(won.policy), len(lost.policy))
        return minus_log_sigmoid(BETA * (log_ratio(won, public, alpha) - log_ratio(lost, public, alpha)))

    return loss


def with_sft(pair: PairLoss, weight: float) -> PairLoss:
    """Pang et al. 2024, equation 1: plus alpha times the chosen answer's NLL over its own length."""

    def loss(example: Example) -> Tensor:
        chosen = example.answers[0].policy
        return pair(example) - weight * chosen.sum() / len(chosen)

    return loss


def with_wpo(pair: PairLoss) -> PairLoss:
    """Zhou et al. 2024, equation 2 with sampled alignment (equation 4): w(x, y) of both answers, at most 1 together, as
    the authors' code has it; no gradient goes through it."""

    def weight(answer: Answer) -> float:
        logs = [float(p - c) for p, c in zip(answer.policy.detach(), answer.collision, strict=True)]
        return float(torch.tensor(sum(logs) / len(logs), dtype=torch.float64).exp())

    def loss(example: Example) -> Tensor:
        won, lost = example.answers
        return pair(example) * min(1.0, weight(won) * weight(lost))

    return loss


def mean(pair: PairLoss) -> SlowLoss:
    def loss(examples: Sequence[Example]) -> Tensor:
        return torch.stack([pair(example) for example in examples]).mean()

    return loss


def weighted_mean(pair: PairLoss) -> SlowLoss:
    """Sum of weight times loss, over the sum of the weights: a pair of weight 2 is that pair twice."""

    def loss(examples: Sequence[Example]) -> Tensor:
        total = sum((example.weight * pair(example) for example in examples), torch.zeros((), dtype=torch.float64))
        return total / sum(example.weight for example in examples)

    return loss


def ipo_ld_pair(alpha: float) -> PairLoss:
    """Azar et al. 2023 per token, on the desensitized likelihoods; what divides is the number of tokens as it is."""

    def loss(example: Example) -> Tensor:
        won, lost = example.answers
        public = min(len(won.policy), len(lost.policy))
        margin = log_ratio(won, public, alpha) / len(won.policy) - log_ratio(lost, public, alpha) / len(lost.policy)
        return (margin - 1 / (2 * BETA)) ** 2

    return loss


def simpo_pair(example: Example) -> Tensor:
    won, lost = example.answers
    return minus_log_sigmoid(2.0 * (won.policy.mean() - lost.policy.mean()) - 1.0)


CASES = [
    Case("dpo, ld", dpo_stage(beta=BETA, length_desensitization=0.3), mean(ld_pair(0.3)), golden=False),
    Case("dpo, ld 0", dpo_stage(beta=BETA, length_desensitization=0.0), mean(ld_pair(0.0)), golden=False),
    Case("dpo, rpo", dpo_stage(beta=BETA, sft_weight=0.5), mean(with_sft(dpo_pair, 0.5)), golden=False),
    Case("dpo, wpo", dpo_stage(beta=BETA, weighting="wpo"), mean(with_wpo(dpo_pair)), golden=False, is_slope=False),
    Case("dpo, pair weights", dpo_stage(beta=BETA, pair_weights="rows"), weighted_mean(dpo_pair), golden=False),
    Case(
        "dpo, all modifiers",
        dpo_stage(
            beta=BETA,
            learning_rate=5e-4,
            length_desensitization=0.3,
            sft_weight=0.5,
            weighting="wpo",
            pair_weights="rows",
        ),
        weighted_mean(with_wpo(with_sft(ld_pair(0.3), 0.5))),
        is_slope=False,
    ),
    Case(
        "ipo, ld and pair weights",
        IpoStage(**SETTINGS, beta=BETA, length_desensitization=0.3, pair_weights="rows"),
        weighted_mean(ipo_ld_pair(0.3)),
        golden=False,
    ),
    Case(
        "simpo, rpo and pair weights",
        SimpoStage(**SETTINGS, sft_weight=0.5, pair_weights="rows"),
        weighted_mean(with_sft(simpo_pair, 0.5)),
        golden=False,
    ),
    # one loss with plain DPO; its curve is another from the first move on
    Case(
        "dpo, live reference",
        dpo_stage(beta=BETA, learning_rate=5e-4, reference_update=ReferenceUpdate(every=10)),
        mean(dpo_pair),
    ),
]
