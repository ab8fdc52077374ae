"""Maximum likelihood, token by token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.support.methods import Case, Example
from tests.support.training import completion_stage, sft_stage


def slow_nll(examples: Sequence[Example]) -> Tensor:
    """Minus the mean log-prob of all trained tokens."""
    return -torch.cat([answer.policy for example in examples for answer in example.answers]).mean()


CASES = [
    Case("sft", sft_stage(), slow_nll, golden=False),
    Case("completion", completion_stage(), slow_nll, golden=False),
]
