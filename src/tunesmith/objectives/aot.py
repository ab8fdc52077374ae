"""Alignment via optimal transport: a step's distributions are compared, quantile by quantile, not pair by pair.

In: figures of a step's pairs. Out: a loss a quantile. Must not know: models, tokens, where the reference came from.

Source: Melnyk et al. 2024, "Distributional preference alignment of LLMs via optimal transport", arXiv:2406.05882,
section 3: the one-dimensional transport problem is solved by sorting both samples; the logistic loss is its convex
relaxation of first-order stochastic dominance.

The sort is over the whole step, so no tree's loss is known without all others, and the order of the step's trees
decides between equal values alone (a stable sort). A quantile is no single pair: weights of pairs have no meaning.

Shapes: P pairs (and as many quantiles), K = 2 answers, the chosen one first. Units: log-ratios in nats.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from tunesmith.objectives.base import Objective
from tunesmith.objectives.pairs import PLAIN, PairOptions, Pairs, paired


def quantile_loss(above_P: Tensor, below_P: Tensor, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Loss of each quantile, [P], lowest first: DPO's of beta * (quantile of `above_P` - quantile of `below_P`).

    The gradient goes through the sorted values of both to where they came from.
    """
    above_P, below_P = above_P.sort(stable=True).values, below_P.sort(stable=True).values
    logits_P = beta * (above_P - below_P)
    return -logsigmoid(logits_P) * (1 - label_smoothing) - logsigmoid(-logits_P) * label_smoothing


def aot_loss(policy_PK: Tensor, reference_PK: Tensor, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """Paired: the policy's margins, log p(w) - log p(l), are to dominate the reference's; [P], by quantile.

    arXiv:2406.05882, section 3 (paired). Where P is 1 this is DPO.
    """
    return quantile_loss(
        policy_PK[:, 0] - policy_PK[:, 1],
        reference_PK[:, 0] - reference_PK[:, 1],
        beta=beta,
        label_smoothing=label_smoothing,
    )


def aot_unpaired_loss(logratio_PK: Tensor, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """Unpaired: the chosen answers' log-ratios are to dominate the rejected ones'; [P], by quantile.

    arXiv:2406.05882, section 3 (unpaired). Where P is 1 this is DPO.
    """
    return quantile_loss(logratio_PK[:, 0], logratio_PK[:, 1], beta=beta, label_smoothing=label_smoothing)


def aot(beta: float, label_smoothing: float = 0.0, *, options: PairOptions = PLAIN) -> Objective:
    """AOT over trees of two branches, chosen first; one unit a pair; weights of pairs are refused."""
    assert not (options.pair_weights or options.wpo), "a quantile is no pair"

    def loss(pairs: Pairs) -> Tensor:
        assert pairs.reference_PK is not None
        return aot_loss(pairs.policy_PK, pairs.reference_PK, beta=beta, label_smoothing=label_smoothing)

    return paired("aot", loss, beta=beta, options=options, separable=False)


def aot_unpaired(beta: float, label_smoothing: float = 0.0, *, options: PairOptions = PLAIN) -> Objective:
    """Unpaired AOT over the same trees; which answers belong together is not used."""
    assert not (options.pair_weights or options.wpo), "a quantile is no pair"

    def loss(pairs: Pairs) -> Tensor:
        return aot_unpaired_loss(pairs.logratio_PK, beta=beta, label_smoothing=label_smoothing)

    return paired("aot_unpaired", loss, beta=beta, options=options, separable=False)
