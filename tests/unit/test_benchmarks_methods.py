"""Our losses beside TRL's, without TRL: what is compared, what a comparison says, and the values that TRL gave."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.methods.agree_cases import ABSENT, COMPARISONS, Comparison
from benchmarks.methods.agree_trl import RESULTS, TOLERANCE, compare, make_rows, ours
from tunesmith.objectives import METHODS

ROWS = {kind: make_rows(kind) for kind in ("reward", "plain")}
KEPT: list[dict[str, Any]] = json.loads(RESULTS.read_text())["comparisons"]


def rows_of(comparison: Comparison) -> list[dict[str, Any]]:
    return ROWS["reward" if comparison.trainer == "reward" else "plain"]


def test_every_method_is_compared_or_said_to_be_absent() -> None:
    assert set(METHODS) == {each.method for each in COMPARISONS if not each.difference} | set(ABSENT)


@pytest.mark.parametrize("number", range(len(COMPARISONS)))
def test_losses_are_those_that_trl_gave(number: int) -> None:
    """The kept values of TRL 1.16 (`make bench` gets them anew), but for the known differences of definition."""
    comparison, kept = COMPARISONS[number], KEPT[number]
    assert kept["name"] == comparison.name and kept["as_expected"]
    loss, _ = ours(comparison, rows_of(comparison))
    apart = abs(loss - kept["theirs"]) / max(1.0, abs(loss))
    assert (apart <= TOLERANCE) == (not comparison.difference)


def test_a_comparison_is_wrong_where_values_or_derivatives_differ_or_a_known_difference_does_not() -> None:
    comparison = COMPARISONS[1]
    loss, slope = ours(comparison, ROWS["plain"])

    def verdict(which: Comparison, theirs: float, derivative: list[float]) -> bool:
        found = compare(which, ROWS["plain"], {"loss": theirs, "slope": derivative})
        return bool(found["as_expected"])

    assert verdict(comparison, loss, slope)
    assert not verdict(comparison, loss + 2e-6, slope)
    assert not verdict(comparison, loss, [slope[0] + 2e-6 * max(map(abs, slope)), *slope[1:]])
    known = replace(comparison, difference="another definition")
    assert verdict(known, loss + 2e-6, slope) and not verdict(known, loss, slope)
