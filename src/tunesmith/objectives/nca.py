"""Noise contrastive alignment: each answer is told from noise by itself, so the chosen one's likelihood does not fall.

In: log-ratios of pairs. Out: the loss of each. Must not know: models, tokens, where the reference came from.

Source: Chen et al. 2024, "Noise contrastive alignment of language models with explicit rewards", arXiv:2402.05369,
section 4.1: NCA for K = 2 answers and hard preferences (its alpha at 0).

Shapes: P pairs, K = 2 answers, the chosen one first. Units: log-ratios in nats.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from tunesmith.objectives.base import Objective
from tunesmith.objectives.pairs import PLAIN, PairOptions, paired


def nca_loss(logratio_PK: Tensor, *, beta: float = 0.1) -> Tensor:
    """Loss of each pair, [P]: -log s(r_w) - log s(-r_w) / 2 - log s(-r_l) / 2 (arXiv:2402.05369, section 4.1).

    s: the sigmoid; r = beta * log-ratio of the chosen (w) and the rejected (l) answer.
    """
    reward_PK = beta * logratio_PK
    return -logsigmoid(reward_PK[:, 0]) - logsigmoid(-reward_PK).mean(-1)


def nca(beta: float, *, options: PairOptions = PLAIN) -> Objective:
    """The objective over trees of two branches, chosen first; one unit a pair."""
    return paired("nca", lambda pairs: nca_loss(pairs.logratio_PK, beta=beta), beta=beta, options=options)
