"""Identity preference optimization: the margin is drawn to a target, so that sure preferences cannot overfit.

In: log-ratios of pairs. Out: the loss of each. Must not know: models, tokens, where the reference came from.

Source: Azar et al. 2023, "A general theoretical paradigm to understand learning from human preferences",
arXiv:2310.12036, equation 17; per token, as the authors confirmed to the maintainers of TRL.

Shapes: P pairs, K = 2 answers, the chosen one first. Units: log-ratios in nats, or in nats per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from tunesmith.objectives.base import Objective, Sum
from tunesmith.objectives.pairs import PLAIN, PairOptions, Pairs, paired, reward_metrics


def ipo_loss(logratio_PK: Tensor, *, beta: float = 0.1) -> Tensor:
    """Loss of each pair, [P]: (margin of log-ratios - 1 / (2 beta))^2 (arXiv:2310.12036, equation 17; beta is tau).

    logratio_PK: of whole answers, or per token; what the target means depends on it.
    """
    return (logratio_PK[:, 0] - logratio_PK[:, 1] - 1 / (2 * beta)).square()


def ipo(beta: float, normalization: Literal["mean", "sum"] = "mean", *, options: PairOptions = PLAIN) -> Objective:
    """The objective over trees of two branches, chosen first; one unit a pair.

    Differs: with "mean" log-ratios are per token of their answer, where equation 17 reads as whole answers ("sum").
    """
    if normalization == "sum":
        return paired("ipo", lambda pairs: ipo_loss(pairs.logratio_PK, beta=beta), beta=beta, options=options)

    def loss(pairs: Pairs) -> Tensor:
        return ipo_loss(pairs.mean_logratio_PK, beta=beta)

    def rewards(pairs: Pairs) -> Mapping[str, Sum]:
        return reward_metrics(beta * pairs.mean_logratio_PK, pairs.tokens_PK)

    return paired("ipo", loss, beta=beta, options=options, more_metrics=rewards)
