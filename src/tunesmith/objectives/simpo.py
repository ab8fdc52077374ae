"""Simple preference optimization: mean log-probs, a target margin, no reference.

In: the figures of pairs. Out: the loss of each. Must not know: models, tokens.

Source: Meng et al. 2024, arXiv:2405.14734, equation 6.

Shapes: P pairs. Units: mean log-probs in nats a token.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from tunesmith.objectives.base import Objective
from tunesmith.objectives.pairs import PLAIN, PairOptions, Pairs, paired


def simpo_loss(mean_chosen_P: Tensor, mean_rejected_P: Tensor, *, beta: float = 2.0, gamma: float = 1.0) -> Tensor:
    """Loss of each pair, [P], from the mean log-probs of its answers' tokens, each [P].

    -log sigmoid(beta * (chosen - rejected) - gamma); gamma is a margin of the scaled rewards.
    """
    return -logsigmoid(beta * (mean_chosen_P - mean_rejected_P) - gamma)


def simpo(beta: float, gamma: float, *, options: PairOptions = PLAIN) -> Objective:
    """The objective over trees of two branches, chosen first; one unit a pair."""

    def loss(pairs: Pairs) -> Tensor:
        return simpo_loss(pairs.mean_PK[:, 0], pairs.mean_PK[:, 1], beta=beta, gamma=gamma)

    return paired("simpo", loss, beta=beta, options=options, needs_reference=False)
