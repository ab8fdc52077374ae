"""Logarithms of odds that stay finite where a probability rounds to 1.

In: log-probs. Out: log(p / (1 - p)), log(1 - p), and exponentials that do not overflow, with finite gradients.
Must not know: methods, answers.

Shapes: any; values are computed in float32, in float64 where they come so.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

NEAREST_TO_1 = -1e-12
"""A log-prob closer to 0 counts as this: its odds are 1e12, and its gradient is 0. A mean log-prob is exactly 0 where
float32 rounds every token's probability to 1."""

EXPONENT_CAP = 30.0
"""Nats past which an exponential goes on along its tangent. e^30 is 1e13: its square, summed over all weights, still
fits a float32 gradient norm."""


def wide(values: Tensor) -> Tensor:
    """The values in float32, or in float64 where they came so."""
    return values if values.dtype == torch.float64 else values.float()


def log1mexp(logprob: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0.

    Near 0 by log(-expm1(x)), else by log1p(-exp(x)); each side is fed only what it can take, since a branch that is
    not chosen still sends its gradient (inf * 0 is nan) through `where`.
    """
    x = wide(logprob).clamp(max=NEAREST_TO_1)
    is_near = x > -math.log(2)
    near = torch.where(is_near, x, -1.0)
    far = torch.where(is_near, -1.0, x)
    return torch.where(is_near, torch.log(-torch.expm1(near)), torch.log1p(-torch.exp(far)))


def log_odds(logprob: Tensor) -> Tensor:
    """log(p / (1 - p)) from log p < 0 (Hong et al. 2024, arXiv:2403.07691, equation 4).

    Differs: a log-prob above -1e-12 counts as -1e-12, where the equation has no finite value.
    """
    x = wide(logprob).clamp(max=NEAREST_TO_1)
    return x - log1mexp(x)


def capped_expm1(values: Tensor) -> Tensor:
    """exp(x) - 1, and above `EXPONENT_CAP` its tangent there: neither overflows nor loses its gradient."""
    low = values.clamp(max=EXPONENT_CAP)
    return torch.expm1(low) + torch.exp(low) * (values - low)
