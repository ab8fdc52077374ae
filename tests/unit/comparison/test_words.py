"""Figures in words: units, signs, and no claim that the interval does not carry."""

from __future__ import annotations

import pytest

from tunesmith.comparison.statistics import Estimate, exact, missing
from tunesmith.comparison.words import Difference, change, findings, headline, interval, number, outcome_of


def known(value: float, low: float, high: float, num: int = 200) -> Estimate:
    return Estimate(value, low, high, num, "bootstrap")


def test_numbers_have_units_and_a_real_minus() -> None:
    assert number(0.935, "share") == "93.5\u00a0%"
    assert number(-0.004, "nats") == "0.00\u00a0nats"
    assert number(None, "tokens") == "–"
    assert change(-0.34, "share") == "−34.0\u00a0points"
    assert change(0.125, "nats") == "+0.12\u00a0nats"


def test_intervals_in_words() -> None:
    assert interval(known(0.9, 0.85, 0.94), "share") == "85.0 to 94.0"
    assert interval(exact(0.5, 9, "why"), "share") == "by definition"
    assert interval(missing("why"), "share") == ""


@pytest.mark.parametrize(
    ("low", "high", "outcome"),
    [(0.01, 0.2, "better"), (-0.2, -0.01, "worse"), (-0.01, 0.2, "open"), (0.0, 0.2, "open"), (-0.2, 0.0, "open")],
)
def test_only_an_interval_that_leaves_zero_says_something(low: float, high: float, outcome: str) -> None:
    assert outcome_of(known(0.0, low, high)) == outcome


def test_a_verdict_names_what_got_better_and_what_cannot_be_told() -> None:
    keys = ("exact_accuracy", "style_share", "preference_accuracy", "preference_accuracy_wrong_answer")
    before = {key: known(0.5, 0.4, 0.6) for key in keys}
    after = {
        "exact_accuracy": known(0.49, 0.4, 0.6),
        "style_share": known(0.81, 0.7, 0.9),
        "preference_accuracy": exact(0.5, 9, "this stage is the reference"),
        "preference_accuracy_wrong_answer": missing("none"),
    }
    deltas = {
        "exact_accuracy": known(-0.01, -0.03, 0.01),
        "style_share": known(0.31, 0.24, 0.38),
        "preference_accuracy": known(0.1, 0.05, 0.15),
        "preference_accuracy_wrong_answer": missing("none"),
    }
    difference = Difference("dpo", "sft", deltas)
    found = findings(difference, {"sft": before, "dpo": after})
    assert [(one.key, one.outcome) for one in found] == [("exact_accuracy", "open"), ("style_share", "better")]
    assert found[0].text.replace("\u00a0", " ") == (
        "Exact answers: 50.0 % → 49.0 %, −1.0 points (95 % interval −3.0 to +1.0): "
        "no difference that 200 prompts can show."
    )
    assert headline(difference, found).replace("\u00a0", " ") == (
        "dpo against sft: better in the preferred style (+31.0 points); "
        "no shown difference in exact answers (−1.0 points)."
    )


def test_nothing_measured_is_said_plainly() -> None:
    assert headline(Difference("sft", "base", {}), []) == "sft against base: nothing could be compared."
