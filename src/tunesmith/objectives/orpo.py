"""Odds ratio preference optimization: SFT on the chosen answer, and its odds over the rejected one's; no reference.

In: the figures of pairs. Out: the loss of each. Must not know: models, tokens.

Source: Hong et al. 2024, arXiv:2403.07691: equation 3 (length-normalized log-prob), 4 (odds), 6 and 7 (the loss).

Shapes: P pairs. Units: nats a token.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from tunesmith.objectives.base import Objective
from tunesmith.objectives.log_odds import log_odds, wide
from tunesmith.objectives.pairs import PLAIN, PairOptions, Pairs, paired


def orpo_loss(mean_chosen_P: Tensor, mean_rejected_P: Tensor, *, beta: float = 0.1) -> Tensor:
    """Loss of each pair, [P], from the mean log-probs of its answers' tokens, each [P].

    -log p(chosen) - beta * log sigmoid(log-odds of chosen - log-odds of rejected); beta is the paper's lambda.
    Differs: the SFT term is the mean over the answer's tokens, pair by pair; the prompt is not in it.
    """
    ratio_P = log_odds(mean_chosen_P) - log_odds(mean_rejected_P)
    return -wide(mean_chosen_P) - beta * logsigmoid(ratio_P)


def orpo(beta: float, *, options: PairOptions = PLAIN) -> Objective:
    """The objective over trees of two branches, chosen first; one unit a pair."""

    def loss(pairs: Pairs) -> Tensor:
        return orpo_loss(pairs.mean_PK[:, 0], pairs.mean_PK[:, 1], beta=beta)

    # without the odds ratio there is no scale of rewards: those of the metrics are then the log-probs themselves
    return paired("orpo", loss, beta=beta or 1.0, options=options, needs_reference=False)
