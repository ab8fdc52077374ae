"""Mixed preference optimization: a weighted sum of losses on the same pairs.

In: the figures of pairs. Out: the loss of each. Must not know: models, tokens.

Source: Wang et al. 2024, arXiv:2411.10442 (MPO): preference loss (DPO), quality loss (BCO) and generation loss (the
chosen answer's negative log-likelihood per token; section 3.2), weighted 0.8, 0.2 and 1 (section 7). DPO + alpha * SFT
alone is RPO (Pang et al. 2024, arXiv:2404.19733, as of its third version; in the first, alpha is DPO's weight); hinge,
IPO and APO-zero may be mixed in.

Shapes: P pairs, K = 2. Units: nats; beta is the same in all parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from tunesmith.objectives.apo import apo_zero_loss
from tunesmith.objectives.base import Objective, Sum
from tunesmith.objectives.bco import Shift, bco_loss, shift_metric, with_shift
from tunesmith.objectives.dpo import dpo_loss
from tunesmith.objectives.hinge import hinge_loss
from tunesmith.objectives.ipo import ipo_loss
from tunesmith.objectives.pairs import PLAIN, PairOptions, Pairs, paired
from tunesmith.recipe.preferences import MixtureWeights


def mixture_loss(pairs: Pairs, weights: MixtureWeights, *, beta: float, shift: Tensor | float = 0.0) -> Tensor:
    """Loss of each pair, [P]: the weighted sum of all losses but SFT's (arXiv:2411.10442), which `paired` adds.

    shift: the reward that BCO's part is measured against. IPO's part is per token, as `ipo`'s default.
    """
    assert pairs.reference_PK is not None
    policy_PK, reference_PK, logratio_PK = pairs.policy_PK, pairs.reference_PK, pairs.logratio_PK
    total_P = torch.zeros_like(policy_PK[:, 0])
    if weights.dpo:
        columns = (*policy_PK.unbind(-1), *reference_PK.unbind(-1))
        total_P = total_P + weights.dpo * dpo_loss(*columns, beta=beta)
    if weights.bco:
        total_P = total_P + weights.bco * bco_loss(*(beta * logratio_PK).unbind(-1), shift=shift)
    if weights.hinge:
        total_P = total_P + weights.hinge * hinge_loss(logratio_PK, beta=beta)
    if weights.ipo:
        total_P = total_P + weights.ipo * ipo_loss(pairs.mean_logratio_PK, beta=beta)
    if weights.apo_zero:
        total_P = total_P + weights.apo_zero * apo_zero_loss(logratio_PK, beta=beta)
    return total_P


def mixture(beta: float, weights: MixtureWeights, *, options: PairOptions = PLAIN) -> Objective:
    """The objective over trees of two branches, chosen first; one unit a pair.

    Where BCO's part counts, it carries BCO's shift, and a step's pairs depend on one another.
    """
    options = replace(options, sft_weight=options.sft_weight + weights.sft)
    if not weights.bco:
        return paired("mixture", lambda pairs: mixture_loss(pairs, weights, beta=beta), beta=beta, options=options)

    def make(shift: Shift) -> Objective:
        def loss(pairs: Pairs) -> Tensor:
            return mixture_loss(pairs, weights, beta=beta, shift=shift(pairs))

        def metrics(pairs: Pairs) -> Mapping[str, Sum]:
            return shift_metric(shift(pairs), pairs)

        return paired("mixture", loss, beta=beta, options=options, more_metrics=metrics)

    return with_shift(make, beta)
