"""A reference that follows the policy: which weights it has, and when it takes new ones.

In: an objective with a reference, and how its reference is to move. Out: the same objective, carrying the reference's
weights from step to step. Must not know: models, engines, how the reference is scored (`train/live.py`).

Source: Gorbatovski et al. 2024, arXiv:2404.09656 (TR-DPO; the same for any method with a reference), the soft update
theta_ref = alpha * theta + (1 - alpha) * theta_ref and the hard one theta_ref = theta, every `every` updates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from tunesmith.engine.logprobs import Logprobs
from tunesmith.objectives.base import Carried, Carrying, Objective, Result

PREFIX = "reference."
"""Before the names of the reference's weights, among what is carried."""
AGE, MOVES = "reference_age", "reference_moves"
"""Updates of the policy since the reference last moved, and how often it has."""


def following(objective: Objective, *, alpha: float, every: int) -> Objective:
    """The objective with a reference that moves `alpha` of the way to the policy after every `every` updates.

    alpha 1 is the hard update. What the objective carries itself, it goes on carrying. Only the trained weights are
    mixed: the others are the same in both. Steps without an update do not count.
    """
    assert objective.needs_reference

    def start(weights: Mapping[str, Tensor]) -> Carried:
        own = objective.start(weights)
        first = {name: weight.detach().clone() for name, weight in weights.items()}
        return _joined(own, first, age=0, moves=0)

    def bind(carried: Carried) -> Callable[[Logprobs], Result]:
        return objective.bound(_own(carried)).function

    def advance(before: Carried, result: Result, weights: Mapping[str, Tensor]) -> Carried:
        own = objective.advance(_own(before), result, weights)
        reference, age, moves = reference_weights(before), int(before.numbers[AGE]) + 1, int(before.numbers[MOVES])
        if age < every:
            return _joined(own, reference, age=age, moves=moves)
        moved = {name: torch.lerp(old, weights[name].detach(), alpha) for name, old in reference.items()}
        return _joined(own, moved, age=0, moves=moves + 1)

    return replace(objective, carrying=Carrying(start, bind, advance), moves_reference=True)


def reference_weights(carried: Carried) -> dict[str, Tensor]:
    """The reference's weights, by the names that the trained ones have."""
    found = {name: tensor for name, tensor in carried.tensors.items() if name.startswith(PREFIX)}
    return {name.removeprefix(PREFIX): tensor for name, tensor in found.items()}


def has_moved(carried: Carried) -> bool:
    """Whether the reference is another than at the stage's start; without a live one it never is."""
    return carried.numbers.get(MOVES, 0) > 0


def _joined(own: Carried, reference: Mapping[str, Tensor], *, age: int, moves: int) -> Carried:
    tensors = {PREFIX + name: tensor for name, tensor in reference.items()}
    return Carried({**own.numbers, AGE: float(age), MOVES: float(moves)}, {**own.tensors, **tensors})


def _own(carried: Carried) -> Carried:
    """What the objective carries itself."""
    numbers = {name: number for name, number in carried.numbers.items() if name not in (AGE, MOVES)}
    return Carried(numbers, {name: each for name, each in carried.tensors.items() if not name.startswith(PREFIX)})
