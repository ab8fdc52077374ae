"""Negative log-likelihood of trained tokens: `sft` (answers) and `completion` (whole texts), with label smoothing.

In: log-probs, and the tokens' weights where the rows have any. Out: the weighted sum of the tokens' losses and the sum
of their weights. Must not know: which tokens are trained, and why.

Shapes: N trained tokens. Units: nats.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from tunesmith.data.types import Tree
from tunesmith.engine.logprobs import Logprobs
from tunesmith.objectives.base import Objective, Result, Sum


def nll_loss(logprob_N: Tensor) -> Tensor:
    """Negative log-likelihood of each trained token, [N], in nats."""
    return -logprob_N


def smoothed_loss(logprob_N: Tensor, mean_N: Tensor, *, smoothing: float) -> Tensor:
    """Cross-entropy with a target that is spread by `smoothing` over the vocabulary, [N], in nats.

    Szegedy et al. 2016 (arXiv:1512.00567), section 7: q'(k) = (1 - e) [k = y] + e / V, so the loss is
    (1 - e) * -log p(y) + e * -(1/V sum_v log p(v)). `mean_N` is that mean over all V rows of the head, spare ones too.
    """
    return -(1 - smoothing) * logprob_N - smoothing * mean_N


def trained_tokens(tree: Tree) -> float:
    """Weight of the tokens of `tree` that the loss reads, 1 each where the rows give none: a text's first token has
    nothing before it, and is not counted."""
    unread = 1 if len(tree.prompt_ids) == 0 else 0
    total = 0.0
    for branch in tree.branches:
        read = branch.trained[unread:]
        weights = None if branch.weights is None else branch.weights[unread:]
        total += int(read.sum()) if weights is None else float(weights[read].sum(dtype=np.float64))
    return total


def supervised(name: str, *, label_smoothing: float = 0.0) -> Objective:
    """The objective of `sft` and `completion`; they differ in which tokens the data marks as trained.

    A step's loss is the mean over its trained tokens, each counting as much as its weight says (a message's weight, on
    all its tokens): sum_n w_n l_n / sum_n w_n over the whole step. With label smoothing the plain negative
    log-likelihood stands beside it as the metric `nll`.
    """

    def function(logprobs: Logprobs) -> Result:
        nll_N = nll_loss(logprobs.logprob_N)
        loss_N = nll_N
        if label_smoothing:
            loss_N = smoothed_loss(logprobs.logprob_N, logprobs.extras["mean"], smoothing=label_smoothing)
        weight_N = logprobs.weight_N
        if weight_N is None:
            count = float(nll_N.numel())
        else:
            count, nll_N, loss_N = float(weight_N.double().sum()), nll_N * weight_N, loss_N * weight_N
        metrics = {"nll": Sum(nll_N.detach().sum(), count)} if label_smoothing else {}
        return Result(Sum(loss_N.sum(), count), metrics)

    return Objective(name, function, trained_tokens, num_answers=1, wants=("mean",) if label_smoothing else ())
