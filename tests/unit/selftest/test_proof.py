from __future__ import annotations

import math

import pytest
import torch
from torch import tensor

from tunesmith.selftest.proof import Proof, broken, relative, skipped, worst_gradient, worst_value


@pytest.mark.parametrize(
    ("error", "verdict"),
    [(0.0, "passed"), (1e-5, "passed"), (1.1e-5, "FAILED"), (math.nan, "FAILED"), (None, "skipped")],
)
def test_verdicts(error: float | None, verdict: str) -> None:
    assert Proof("a", "b", error, 1e-5).verdict == verdict


def test_skipped_and_broken_say_why() -> None:
    assert skipped("a", "no card").verdict == "skipped"
    found = broken("a", ValueError("two\nlines"))
    assert (found.verdict, found.reason) == ("FAILED", "ValueError: two lines")


def test_differences_by_hand() -> None:
    assert relative(1.5, 1.0) == 0.5
    assert relative(-9.0, -10.0) == pytest.approx(0.1)
    assert relative(0.3, 0.1) == pytest.approx(0.2)  # below 1 the difference itself
    assert worst_value(tensor([1.0, -4.5]), tensor([1.5, -5.0])) == pytest.approx(0.1)
    assert worst_value(tensor([1.0]), tensor([1.0, 2.0])) == math.inf


def test_gradients_are_compared_tensor_by_tensor() -> None:
    expected = {"w": tensor([3.0, 4.0]), "b": tensor([1e-9])}
    assert worst_gradient({"w": tensor([3.0, 4.5]), "b": tensor([1e-9])}, expected) == pytest.approx(0.1)
    # the floor is 1e-4 of the largest norm: rounding beside it is no error
    assert worst_gradient({"w": tensor([3.0, 4.0]), "b": tensor([-4e-9])}, expected) == pytest.approx(5e-9 / 5e-4)
    assert worst_gradient({"w": expected["w"]}, expected) == math.inf
    assert worst_gradient({}, {}) == math.inf
    assert math.isnan(worst_gradient({**expected, "w": torch.full((2,), math.nan)}, expected))
