"""Log-probs that a test states itself, answer by answer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, tensor

from tunesmith.engine.logprobs import Logprobs

Answers = Sequence[Sequence[float]]


def logprobs_of_pairs(policy: Answers, reference: Answers | None = None, scores: Sequence[float] = ()) -> Logprobs:
    """What an objective sees of pairs whose answers' tokens have these log-probs, chosen and rejected in turn."""
    lengths_B = tensor([len(answer) for answer in policy])
    numbers_B = torch.arange(len(policy))
    return Logprobs(
        flat(policy).requires_grad_(),
        numbers_B.repeat_interleave(lengths_B),
        numbers_B // 2,
        None if reference is None else flat(reference),
        score_B=tensor(list(scores)) if scores else None,
    )


def flat(answers: Answers) -> Tensor:
    """All tokens' values, end to end."""
    return tensor([value for answer in answers for value in answer])
