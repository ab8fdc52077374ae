"""The reward model, pair by pair from the papers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.support.methods import Case, Example, SlowLoss
from tests.support.training import reward_stage


def slow_reward(*, margins: bool = False, centering: float = 0.0) -> SlowLoss:
    """Ouyang et al. 2022, equation 1; m(r) of Touvron et al. 2023, equation 2; Eisenstein et al. 2023's regularizer."""

    def loss(examples: Sequence[Example]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for example in examples:
            won, lost = (answer.policy.sum() for answer in example.answers)
            lead = won - lost
            if margins:
                lead = lead - (example.scores[0] - example.scores[1])
            total = total + torch.log(1 + torch.exp(-lead)) + centering * (won + lost) ** 2
        return total / len(examples)

    return loss


CASES = [
    Case("reward", reward_stage(), slow_reward()),
    Case("reward, margins", reward_stage(margin="scores"), slow_reward(margins=True), golden=False),
    Case("reward, centered", reward_stage(centering=0.05), slow_reward(centering=0.05), golden=False),
]
