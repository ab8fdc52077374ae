"""Hinge: DPO as a support vector machine, where a pair counts until its margin is 1.

In: log-ratios of pairs. Out: the loss of each. Must not know: models, tokens, where the reference came from.

Source: Liu et al. 2023, "Statistical rejection sampling improves preference optimization" (RSO), arXiv:2309.06657, the
loss "hinge-norm", after the hinge of SLiC (Zhao et al. 2023, arXiv:2305.10425, section 2).

Shapes: P pairs, K = 2 answers, the chosen one first. Units: log-ratios in nats.
"""

from __future__ import annotations

from torch import Tensor

from tunesmith.objectives.base import Objective
from tunesmith.objectives.pairs import PLAIN, PairOptions, paired


def hinge_loss(logratio_PK: Tensor, *, beta: float = 0.1) -> Tensor:
    """Loss of each pair, [P]: max(0, 1 - beta * margin of log-ratios) (arXiv:2309.06657, hinge-norm; beta is gamma).

    Differs: SLiC (arXiv:2305.10425) takes the policy's log-probs alone; here, as in RSO, they are beside a reference's.
    """
    return (1 - beta * (logratio_PK[:, 0] - logratio_PK[:, 1])).relu()


def hinge(beta: float, *, options: PairOptions = PLAIN) -> Objective:
    """The objective over trees of two branches, chosen first; one unit a pair."""
    return paired("hinge", lambda pairs: hinge_loss(pairs.logratio_PK, beta=beta), beta=beta, options=options)
