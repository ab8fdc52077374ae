"""R9: 50 steps of every method, figure by figure."""

from __future__ import annotations

import json
from typing import get_args

import pytest

from tests.golden.curves import NUM_STEPS, STAGES, curves_of, path_of
from tunesmith.recipe.models import Stage

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
        scale = max(abs(value) for value in values)
        assert found[key] == pytest.approx(values, rel=tolerance, abs=tolerance * scale), key


@pytest.mark.parametrize("name", STAGES)
def test_golden_loss_falls_by_a_quarter(name: str) -> None:
    losses = json.loads(path_of(name).read_text())["loss"]
    assert losses[-1] < 0.75 * losses[0]


def test_every_method_has_a_curve() -> None:
    methods = {get_args(kind.model_fields["method"].annotation)[0] for kind in get_args(get_args(Stage)[0])}
    assert set(STAGES) == methods
