"""Diagnoses of any stage, on records made by hand: where each speaks, and where it is silent."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tunesmith.diagnosis.base import Curves, Settings, Table
from tunesmith.diagnosis.diagnose import DIAGNOSES, diagnose
from tunesmith.diagnosis.learning import dead_adapter, gradient_spikes, overfitting, rate_too_high
from tunesmith.diagnosis.samples import forgetting, language_drift, repetition, truncation
from tunesmith.runs.records import Record

SFT = Settings("sft", 2e-4, epochs=3)


def steps(losses: Sequence[float], norms: Sequence[float] = ()) -> Table:
    records: list[Record] = [
        {"step": step, "loss": loss, "lr": 2e-4, "grad_norm": norms[step - 1] if norms else 1.0}
        for step, loss in enumerate(losses, start=1)
    ]
    return Table(records)


def evaluated(key: str, values: Sequence[float], every: int = 10) -> Table:
    return Table([{"step": every * place, key: value} for place, value in enumerate(values)])


FALLING = [2.0 - 0.02 * step for step in range(50)]


@pytest.mark.parametrize(
    ("heldout", "is_found"),
    [
        ([2.0, 1.5, 1.4, 1.5, 1.6], True),  # two evaluations in a row, each above 1.4 by more than a twentieth
        ([2.0, 1.5, 1.4, 1.46, 1.6], False),
        ([2.0, 1.5, 1.4, 1.6, 1.45], False),  # it comes back
        ([2.0, 1.9, 1.8, 1.7, 1.6], False),
        ([0.1, 0.05, 0.06, 0.065], False),  # less than 0.02 nats
        ([2.0, 2.2], False),  # one evaluation can be chance
    ],
)
def test_a_held_out_loss_that_turns(heldout: list[float], is_found: bool) -> None:
    found = overfitting(Curves(steps(FALLING), evaluated("loss", heldout)), SFT)
    assert (found is not None) == is_found
    if found is not None:
        assert found.evidence.startswith("the held-out loss was lowest at step 20 (1.4) and is 1.6 at step 40, while")
        assert "`epochs: 2`" in found.remedy and "`keep: best`" in found.remedy


def test_a_training_loss_that_rises_too_is_no_overfitting() -> None:
    rising = [1.0 + 0.02 * step for step in range(50)]
    assert overfitting(Curves(steps(rising), evaluated("loss", [2.0, 1.5, 1.4, 1.5, 1.6])), SFT) is None


def test_a_held_out_margin_that_turns() -> None:
    found = overfitting(Curves(steps(FALLING), evaluated("margin", [0.0, 0.4, 0.8, 0.5, 0.4])), SFT)
    assert found is not None and "the held-out margin was highest at step 20 (0.8)" in found.evidence
    assert overfitting(Curves(steps(FALLING), evaluated("margin", [0.0, 0.4, 0.8, 0.7, 0.65])), SFT) is None


def test_spikes_are_counted_in_the_last_hundred_steps() -> None:
    norms = [1.0] * 30 + [11.0] + [1.0] * 20 + [12.0] + [1.0] * 20 + [13.0]
    found = gradient_spikes(Curves(steps([1.0] * len(norms), norms)), SFT)
    assert found is not None and "steps 31, 52, 73; up to 13, usually 1" in found.evidence
    assert gradient_spikes(Curves(steps([1.0] * 72, norms[:72])), SFT) is None  # two
    long_after = [*norms, *[1.0] * 60]  # the first of them is 103 steps ago
    assert gradient_spikes(Curves(steps([1.0] * len(long_after), long_after)), SFT) is None


def test_a_rate_too_high() -> None:
    start = [2.0] * 5
    found = rate_too_high(Curves(steps([*start, *[3.0] * 20])), SFT)
    assert found is not None and "`learning_rate: 4e-05`" in found.remedy
    assert rate_too_high(Curves(steps([*start, *[2.4] * 20])), SFT) is None  # 0.4 is less than a quarter of 2
    jumps = [1.0] * 60
    for place in (30, 40, 50):
        jumps[place] = 4.5
    assert rate_too_high(Curves(steps(jumps)), SFT) is not None
    risen = rate_too_high(Curves(steps([1.0] * 60), warnings={"rising loss": 44}), SFT)
    assert risen is not None and risen.told_by == ("rising loss",)


def test_a_dead_adapter() -> None:
    assert dead_adapter(Curves(steps([2.0] * 20, [1e-8] * 20)), SFT) is not None
    assert dead_adapter(Curves(steps([2.0] * 20, [1e-8] * 19 + [0.1])), SFT) is None
    assert dead_adapter(Curves(steps([1e-5] * 20, [1e-8] * 20)), SFT) is None  # nothing is left to learn
    found = dead_adapter(Curves(steps([2.0] * 20), warnings={"unmoved weights": 10}), SFT)
    assert found is not None and "step 10" in found.evidence


@pytest.mark.parametrize(
    ("look", "key", "values", "is_found"),
    [
        (repetition, "sample_repetition", [0.02, 0.1, 0.25], True),
        (repetition, "sample_repetition", [0.02, 0.25, 0.1], False),
        (repetition, "sample_repetition", [0.6, 0.65], False),  # the base does it as well
        (repetition, "sample_repetition", [0.9], False),
        (truncation, "sample_truncated", [0.1, 0.6], True),
        (truncation, "sample_truncated", [0.1, 0.4], False),
        (truncation, "sample_truncated", [0.9, 1.0], False),
        (language_drift, "sample_language", [1.0, 0.7], True),
        (language_drift, "sample_language", [1.0, 0.9], False),
        (forgetting, "retained_loss", [1.5, 1.7], True),
        (forgetting, "retained_loss", [1.5, 1.6], False),  # a tenth of 1.5 is 0.15
        (forgetting, "retained_loss", [0.2, 0.28], False),  # less than a tenth of a nat
    ],
)
def test_what_is_written_is_compared_with_the_start(
    look: object, key: str, values: list[float], is_found: bool
) -> None:
    assert callable(look)
    assert (look(Curves(evaluations=evaluated(key, values)), SFT) is not None) == is_found


@pytest.mark.parametrize(("count", "is_found"), [(2.0, False), (4.0, False), (8.0, True)])
def test_a_change_of_one_or_two_sampled_answers_is_no_finding(count: float, is_found: bool) -> None:
    """From 0 % to 50 % cut: one answer of two, two of four, four of eight."""
    rows = [
        {"step": 10 * place, "sample_truncated": cut, "sample_count": count} for place, cut in enumerate((0.0, 0.5))
    ]
    assert (truncation(Curves(evaluations=Table(rows)), SFT) is not None) == is_found


def test_findings_bear_their_names_and_problems_come_first() -> None:
    norms = [1.0] * 30 + [11.0] + [1.0] * 20 + [12.0] + [1.0] * 20 + [13.0]
    table = evaluated("retained_loss", [1.0, 2.0])
    found = diagnose(Curves(steps([1.0] * len(norms), norms), table), SFT)
    assert [each.name for each in found] == ["forgetting", "gradient spikes"]
    assert {each.name for each in found} <= DIAGNOSES.keys()


def test_no_records_show_nothing() -> None:
    assert diagnose(Curves(), SFT) == []
    assert diagnose(Curves(), Settings("dpo", 5e-6, is_preference=True, beta=0.1)) == []
    assert diagnose(Curves(steps([float("nan")] * 40)), SFT) == []
