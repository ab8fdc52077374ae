"""Robust DPO: a DPO loss that random flips of the preferences do not bias.

In: log-ratios of pairs. Out: the loss of each. Must not know: models, tokens, where the reference came from.

Source: Chowdhury, Kini and Natarajan 2024, "Provably robust DPO", arXiv:2403.00409, section 3.1.

Shapes: P pairs, K = 2 answers, the chosen one first. Units: log-ratios in nats.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from tunesmith.objectives.base import Objective
from tunesmith.objectives.pairs import PLAIN, PairOptions, paired


def robust_dpo_loss(logratio_PK: Tensor, *, beta: float = 0.1, label_smoothing: float = 0.1) -> Tensor:
    """Loss of each pair, [P]: ((1 - e) L(w, l) - e L(l, w)) / (1 - 2 e) with DPO's L (arXiv:2403.00409, section 3.1).

    label_smoothing in (0, 0.5) is e, the share of flipped pairs. Its mean over flipped labels is the loss of the true
    ones; so it falls without bound, to -e / (1 - 2 e) of the margin, where the policy is sure.
    """
    logits_P = beta * (logratio_PK[:, 0] - logratio_PK[:, 1])
    kept_P, flipped_P = -logsigmoid(logits_P), -logsigmoid(-logits_P)
    return ((1 - label_smoothing) * kept_P - label_smoothing * flipped_P) / (1 - 2 * label_smoothing)


def robust_dpo(beta: float, label_smoothing: float, *, options: PairOptions = PLAIN) -> Objective:
    """The objective over trees of two branches, chosen first; one unit a pair."""
    return paired(
        "robust_dpo",
        lambda pairs: robust_dpo_loss(pairs.logratio_PK, beta=beta, label_smoothing=label_smoothing),
        beta=beta,
        options=options,
    )
