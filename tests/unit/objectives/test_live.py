"""When a live reference moves, and where to."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, tensor

from tunesmith.objectives import Carried, Carrying, Objective, Result, Sum
from tunesmith.objectives.dpo import dpo
from tunesmith.objectives.live import following, has_moved, reference_weights
from tunesmith.objectives.pairs import carried as carrying_of

STEP = Result(Sum(torch.zeros(()), 1.0))


def weights(value: float) -> dict[str, Tensor]:
    return {"a": tensor([value, 0.0])}


def walked(objective: Objective, values: list[float]) -> list[float]:
    """The reference's first number after the start at 0 and after each update, the policy having these."""
    state = objective.start(weights(0.0))
    found = [float(reference_weights(state)["a"][0])]
    for value in values:
        state = objective.advance(state, STEP, weights(value))
        found.append(float(reference_weights(state)["a"][0]))
    return found


def test_a_soft_update_is_part_of_the_way_and_only_when_it_is_due() -> None:
    # every 2: 0.25 * 8 + 0.75 * 0 = 2, then 0.25 * 4 + 0.75 * 2 = 2.5
    assert walked(following(dpo(0.1), alpha=0.25, every=2), [6, 8, 100, 4, 7]) == [0, 0, 2, 2, 2.5, 2.5]


def test_a_hard_update_is_the_policy() -> None:
    assert walked(following(dpo(0.1), alpha=1.0, every=3), [1, 2, 3, 4, 5, 6]) == [0, 0, 0, 3, 3, 3, 6]


def test_it_holds_copies_and_changes_none_that_it_was_given() -> None:
    objective = following(dpo(0.1), alpha=0.5, every=1)
    policy = weights(1.0)
    before = objective.start(policy)
    policy["a"].fill_(3.0)
    after = objective.advance(before, STEP, policy)
    policy["a"].fill_(9.0)
    assert (float(reference_weights(before)["a"][0]), float(reference_weights(after)["a"][0])) == (1.0, 2.0)
    assert (has_moved(before), has_moved(after)) == (False, True)


def test_it_composes_with_a_method_that_carries_something() -> None:
    def advance(had: Carried, result: Result, given: Mapping[str, Tensor]) -> Carried:
        return Carried({"shift": had.numbers["shift"] + 1}, {"mean": had.tensors["mean"] + given["a"]})

    seen: list[Carried] = []

    def bind(had: Carried) -> object:
        seen.append(had)
        return dpo(0.1).function

    inner = Carrying(lambda given: Carried({"shift": 0.5}, {"mean": given["a"] * 10}), bind, advance)  # type: ignore[arg-type]
    objective = following(carrying_of(dpo(0.1), inner), alpha=1.0, every=1)
    state = objective.advance(objective.start(weights(1.0)), STEP, weights(2.0))
    assert state.numbers == {"shift": 1.5, "reference_age": 0.0, "reference_moves": 1.0}
    assert {name: each.tolist() for name, each in state.tensors.items()} == {
        "mean": [12.0, 0.0],
        "reference.a": [2.0, 0.0],
    }
    objective.bound(state)
    assert (dict(seen[-1].numbers), list(seen[-1].tensors)) == ({"shift": 1.5}, ["mean"])


def test_the_loop_is_told_that_it_moves() -> None:
    assert following(dpo(0.1), alpha=0.5, every=1).moves_reference
    with pytest.raises(AssertionError):
        following(Objective("none", dpo(0.1).function, lambda tree: 1, num_answers=2), alpha=0.5, every=1)
