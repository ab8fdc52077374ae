"""The learning rate of a step, in closed form: no scheduler, no state, nothing to step twice.

In: the step's number. Out: a factor of the peak learning rate. Must not know: optimizers, torch.
"""

from __future__ import annotations

import math
from typing import Literal

Kind = Literal["cosine", "linear", "constant"]


def num_warmup_steps(num_steps: int, warmup_fraction: float) -> int:
    """Steps of the rise: the fraction of all steps, rounded up, so that any fraction above 0 gives one."""
    return min(num_steps, math.ceil(warmup_fraction * num_steps - 1e-9))  # 0.1 * 30 is a bit over 3 in floats


def lr_multiplier(step: int, num_steps: int, *, warmup_fraction: float, kind: Kind) -> float:
    """Factor for the update number `step`, from 1 to `num_steps`.

    The warm-up's w steps take 1/w, 2/w, ..., 1. The first step after it has the whole rate, and the decay
    reaches 0 one step after the last, so that no update is wasted on a rate of 0.
    """
    assert 1 <= step <= num_steps
    warmup = num_warmup_steps(num_steps, warmup_fraction)
    if step <= warmup:
        return step / warmup
    progress = (step - 1 - warmup) / (num_steps - warmup)
    if kind == "constant":
        return 1.0
    if kind == "linear":
        return 1.0 - progress
    return 0.5 * (1.0 + math.cos(math.pi * progress))
