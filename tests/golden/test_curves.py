"""R9: 50 steps of every method, figure by figure."""

from __future__ import annotations

import json
import math

import pytest

from tests.golden.curves import NUM_STEPS, STAGES, curves_of, path_of
from tunesmith.objectives import METHODS

TOLERANCE = 1e-6
"""Relative, float32 on one thread. Other instruction sets (SSE, AVX2, AVX-512) differ by up to 4e-7."""

NORM_TOLERANCE = 4e-6
"""Of the gradient's norm, which carries the rounding of every weight."""


@pytest.mark.parametrize("name", STAGES)
def test_curve_is_the_golden_one(name: str) -> None:
    golden, found = json.loads(path_of(name).read_text()), curves_of(name)
    assert found.keys() == golden.keys()
    assert golden["step"] == list(range(1, NUM_STEPS + 1))
    for key, values in golden.items():
        # figures that pass through 0 (margins) are compared beside the largest of their curve
        tolerance = NORM_TOLERANCE if key == "grad_norm" else TOLERANCE
        scale = max(abs(value) for value in values if value is not None)
        wanted, seen = ([math.nan if value is None else value for value in each] for each in (values, found[key]))
        # a step without an answer of one label has no mean of its reward
        assert seen == pytest.approx(wanted, rel=tolerance, abs=tolerance * scale, nan_ok=True), key


@pytest.mark.parametrize("name", STAGES)
def test_golden_loss_falls(name: str) -> None:
    """By a quarter of itself in 50 steps; where a loss may be negative, or starts at its constant, by a hundredth."""
    losses = json.loads(path_of(name).read_text())["loss"]
    assert losses[-1] < losses[0] - (
        0.25 * losses[0] if name in ("sft", "completion", "dpo") else 0.01 * abs(losses[0])
    )


def test_every_method_has_a_curve() -> None:
    assert {stage.method for stage in STAGES.values()} == set(METHODS)
