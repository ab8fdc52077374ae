"""What keeps a policy near its reference: the f-divergences of f-DPO.

In: log-ratios of answers. Out: what stands for the log-ratio in DPO's loss. Must not know: losses, models.

Source: Wang et al. 2023, arXiv:2309.16240 (f-DPO), its divergences and its loss: a pair's logit is
beta * f'(u_chosen) - beta * f'(u_rejected) with u = policy / reference. Constants of f' cancel in a pair.
"""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor
from torch.nn.functional import logsigmoid

from tunesmith.objectives.log_odds import capped_expm1

Divergence = Literal["reverse_kl", "forward_kl", "jensen_shannon", "alpha"]


def divergence_score(logratio: Tensor, divergence: Divergence, *, alpha: float = 0.5) -> Tensor:
    """f'(u) of log u, shifted so that it is 0 where the policy is its reference; the shape stays.

    reverse_kl: log u; forward_kl: 1 - 1/u; jensen_shannon: log(2u / (1 + u)); alpha: (1 - u^-alpha) / alpha with
    alpha in (0, 1), which goes to reverse_kl as alpha goes to 0 and is forward_kl at 1.
    Differs: an exponent past 30 nats goes on along its tangent, so that an answer that lost its likelihood neither
    overflows nor stops being pulled back.
    """
    if divergence == "reverse_kl":
        return logratio
    if divergence == "forward_kl":
        return -capped_expm1(-logratio)
    if divergence == "jensen_shannon":
        return math.log(2) + logsigmoid(logratio)
    return -capped_expm1(-alpha * logratio) / alpha
