"""Negative log-likelihood of trained tokens: `sft` (answers) and `completion` (whole texts).

In: log-probs. Out: the sum of -log p and the number of tokens. Must not know: which tokens are trained, and why.
"""

from __future__ import annotations

from torch import Tensor

from tunesmith.data.types import Tree
from tunesmith.engine.logprobs import Logprobs
from tunesmith.objectives.base import Objective, Result, Sum


def nll_loss(logprob_N: Tensor) -> Tensor:
    """Negative log-likelihood of each trained token, [N], in nats."""
    return -logprob_N


def nll(logprobs: Logprobs) -> Result:
    """Sum of the negative log-likelihoods over all trained tokens, and their number."""
    total = nll_loss(logprobs.logprob_N).sum()
    return Result(Sum(total, logprobs.logprob_N.numel()))


def trained_tokens(tree: Tree) -> int:
    """Tokens of `tree` that the loss reads: a text's first token has nothing before it, and is not counted."""
    unread = sum(int(branch.trained[0]) for branch in tree.branches) if len(tree.prompt_ids) == 0 else 0
    return tree.num_trained - unread


def supervised(name: str) -> Objective:
    """The objective of `sft` and `completion`; they differ in which tokens the data marks as trained."""
    return Objective(name, nll, trained_tokens, num_answers=1)
