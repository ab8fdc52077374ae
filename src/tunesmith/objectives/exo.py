"""Efficient exact optimization: the reverse KL from the policy's preference to the data's, where DPO has the forward.

In: log-ratios of pairs. Out: the loss of each. Must not know: models, tokens, where the reference came from.

Source: Ji et al. 2024, "Towards efficient exact optimization of language model alignment", arXiv:2402.00856,
equation 16 with K = 2 (EXO-pref).

Shapes: P pairs, K = 2 answers, the chosen one first. Units: log-ratios in nats.
"""

from __future__ import annotations

import math

from torch import Tensor

from tunesmith.objectives.base import Objective
from tunesmith.objectives.pairs import PLAIN, PairOptions, paired


def exo_loss(logratio_PK: Tensor, *, beta: float = 0.1, label_smoothing: float = 1e-3) -> Tensor:
    """Loss of each pair, [P]: KL(q || p) (arXiv:2402.00856, equation 16, K = 2).

    q = softmax of beta * log-ratios over the two answers, the policy's preference; p = (1 - label_smoothing,
    label_smoothing), the data's. label_smoothing in (0, 0.5): at 0 the KL is infinite wherever the policy doubts.
    """
    log_q_PK = (beta * logratio_PK).log_softmax(-1)
    against_PK = log_q_PK - log_q_PK.new_tensor([math.log1p(-label_smoothing), math.log(label_smoothing)])
    return (log_q_PK.exp() * against_PK).sum(-1)


def exo(beta: float, label_smoothing: float, *, options: PairOptions = PLAIN) -> Objective:
    """The objective over trees of two branches, chosen first; one unit a pair."""
    return paired(
        "exo",
        lambda pairs: exo_loss(pairs.logratio_PK, beta=beta, label_smoothing=label_smoothing),
        beta=beta,
        options=options,
    )
