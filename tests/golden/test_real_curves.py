"""The first steps of every method on real preferences, beside the kept curves of 100 steps.

`make methods` runs them whole, with two models.
"""

from __future__ import annotations

import pytest

from benchmarks.methods.real import BY_NAME, NUM_STEPS, SHARED, TOLERANCE, apart, faults, measured, read_kept
from tunesmith.objectives import METHODS

NUM_FIRST = 2
KEPT = {model: read_kept(model) for model in ("stories260K", "embedded")}


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not here")
@pytest.mark.parametrize("name", ["dpo", "kto", "plackett_luce", "reward"])  # a kind of rows each
def test_a_curve_begins_as_the_kept_one(name: str) -> None:
    found = measured(BY_NAME[name], "stories260K", num_steps=NUM_FIRST)
    assert len(found["loss"]) == NUM_FIRST
    assert apart(found["loss"], KEPT["stories260K"][name]["loss"]) <= TOLERANCE


@pytest.mark.parametrize("model", KEPT)
def test_every_method_has_its_curves_and_learns(model: str) -> None:
    assert {BY_NAME[name].method for name in KEPT[model]} == set(METHODS)
    for name, kept in KEPT[model].items():
        assert len(kept["loss"]) == NUM_STEPS
        assert faults(BY_NAME[name], kept, None) == [], name
