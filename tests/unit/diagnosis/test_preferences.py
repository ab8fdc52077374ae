"""Diagnoses of preference stages, on records made by hand: where each speaks, and where it is silent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from tunesmith.diagnosis.base import Curves, Settings, Table
from tunesmith.diagnosis.preferences import (
    kl_over_budget,
    length_correlation,
    length_hacking,
    likelihood_displacement,
    margin_stuck,
    saturation,
    wrong_reference,
)
from tunesmith.runs.records import Record

DPO = Settings("dpo", 5e-6, is_preference=True, beta=0.1, sft_weight=0.0, kl_budget=10.0)


def pair(step: int, **figures: float) -> Record:
    usual: Record = {"step": step, "loss": 0.6, "lr": 5e-6, "margin": 0.1, "accuracy": 0.7, "grad_norm": 1.0}
    usual |= {"logratio_chosen": 0.5, "logratio_rejected": -0.5, "logprob_chosen": -40.0, "logprob_rejected": -50.0}
    return usual | {"tokens_chosen": 20.0, "tokens_rejected": 22.0} | figures


def steps(num: int, **figures: float) -> Table:
    return Table([pair(step, **figures) for step in range(1, num + 1)])


def evaluations(key: str, values: Sequence[float], **figures: float) -> Table:
    return Table([pair(10 * place, **(figures | {key: value})) for place, value in enumerate(values)])


@pytest.mark.parametrize(
    ("start", "now", "margin", "tokens", "is_found"),
    [
        (-40.0, -42.1, 0.3, 20.0, True),  # 2.1 nats of 20 tokens: above 2, and above 0.1 a token
        (-40.0, -41.9, 0.3, 20.0, False),
        (-40.0, -42.9, 0.3, 30.0, False),  # a long answer may lose a tenth of a nat a token: 3
        (-40.0, -43.1, 0.3, 30.0, True),
        (-40.0, -45.0, -0.1, 20.0, False),  # the margin falls as well: that is something else
        (-40.0, -30.0, 0.3, 20.0, False),
    ],
)
def test_displacement_on_held_out_pairs(start: float, now: float, margin: float, tokens: float, is_found: bool) -> None:
    records = [pair(0, logprob_chosen=start, margin=0.0, tokens_chosen=tokens)]
    records += [pair(10, logprob_chosen=now, margin=margin, tokens_chosen=tokens)]
    found = likelihood_displacement(Curves(evaluations=Table(records)), DPO)
    assert (found is not None) == is_found
    if found is not None:
        assert found.step == 10 and found.severity == "problem"
        assert found.figures["nats_lost"] == pytest.approx(start - now)
        assert found.remedy.startswith("In this order: `sft_weight: 0.2` (now 0), which holds it up; `beta: 0.2`")


def test_displacement_is_read_from_the_steps_where_nothing_is_held_out() -> None:
    curves = Curves(steps(20, logratio_chosen=-3.0))
    found = likelihood_displacement(curves, DPO)
    assert found is not None and found.evidence.startswith(
        "in the last 20 steps the chosen answer has lost 3 nats (0.15"
    )
    assert likelihood_displacement(Curves(steps(19, logratio_chosen=-3.0)), DPO) is None
    assert likelihood_displacement(curves, replace(DPO, method="apo_down")) is None  # it lowers both, and says so


def test_displacement_of_answers_with_a_label() -> None:
    """A reward of -0.3 at beta 0.1 is 3 nats."""
    records: list[Record] = [{"step": 0, "loss": 0.5, "reward_desirable": 0.0, "reward_undesirable": 0.0}]
    records += [{"step": 9, "loss": 0.4, "reward_desirable": -0.3, "reward_undesirable": -0.9}]
    found = likelihood_displacement(Curves(evaluations=Table(records)), DPO)
    assert found is not None and found.figures["nats_lost"] == pytest.approx(3.0)


def test_the_correlation_of_margin_and_length_is_pearsons_without_the_trend() -> None:
    """Margin = 0.01 a step (a trend) + 0.1 a token of difference: correlation 1."""
    draw = np.random.default_rng(0)
    longer = draw.normal(0, 5, 40)
    records = [
        pair(step + 1, margin=0.01 * step + 0.1 * longer[step], tokens_chosen=30 + longer[step], tokens_rejected=30.0)
        for step in range(40)
    ]
    assert length_correlation(Curves(Table(records))) == pytest.approx(1, abs=0.02)
    assert math.isnan(length_correlation(Curves(Table(records[:39]))))
    assert math.isnan(length_correlation(Curves(steps(40))))  # nothing varies


def test_length_hacking_needs_answers_that_grow_or_a_correlation_that_is_almost_one() -> None:
    draw = np.random.default_rng(1)
    longer, noise = draw.normal(0, 5, 40), draw.normal(0, 0.6, 40)
    records = [
        pair(step + 1, margin=0.1 * longer[step] + noise[step], tokens_chosen=30 + longer[step], tokens_rejected=30.0)
        for step in range(40)
    ]
    curves = Curves(Table(records))
    assert 0.5 < length_correlation(curves) < 0.8
    assert length_hacking(curves, DPO) is None
    grown = Curves(curves.metrics, evaluations("sample_tokens", [30, 31, 45]))
    found = length_hacking(grown, DPO)
    assert found is not None and found.severity == "problem"
    assert "from 30 tokens to 45" in found.evidence and "`length_desensitization: 0.5`" in found.remedy
    assert length_hacking(Curves(curves.metrics, evaluations("sample_tokens", [30, 31, 35])), DPO) is None
    assert length_hacking(Curves(steps(40), evaluations("sample_tokens", [30, 45])), DPO) is None


def test_a_stuck_margin_has_three_causes() -> None:
    same = {"logprob_chosen": -40.0, "logprob_rejected": -40.00005, "tokens_chosen": 20.0, "tokens_rejected": 20.0}
    still = {"margin": 1e-4, "logratio_chosen": 1e-3, "logratio_rejected": -1e-3}
    coin = {"margin": 0.004, "logratio_chosen": 0.8, "logratio_rejected": 0.76, "accuracy": 0.52}
    causes = {}
    for name, figures in (("same", same), ("still", still), ("coin", coin)):
        found = margin_stuck(Curves(steps(50, **figures)), DPO)
        assert found is not None and found.name == "margin stuck at zero"
        causes[name] = found.cause
    assert causes["same"] == "the answers of the pairs are identical"
    assert causes["still"].startswith("the learning rate is too small")
    assert causes["coin"].startswith("both answers move alike")


def test_a_margin_may_be_small_while_the_rate_rises() -> None:
    """50 updates at the full rate are awaited; or the end of the stage."""
    still = {"margin": 1e-4, "logratio_chosen": 1e-3, "logratio_rejected": -1e-3}
    assert margin_stuck(Curves(steps(49, **still)), DPO) is None
    assert margin_stuck(Curves(steps(90, lr=2.5e-6, **still)), DPO) is None
    assert margin_stuck(Curves(steps(49, **still), is_over=True), DPO) is not None
    assert margin_stuck(Curves(steps(4, **still), is_over=True), DPO) is None


def test_an_open_margin_is_not_stuck() -> None:
    assert margin_stuck(Curves(steps(60)), DPO) is None
    assert margin_stuck(Curves(steps(60, accuracy=0.5)), DPO) is None  # its margin is a nat


def test_a_reference_that_is_another_model() -> None:
    """0.01 nats a token may be rounding: 0.2 for 20 tokens."""
    for value, is_found in ((0.19, False), (-0.21, True), (0.21, True)):
        start = Table([pair(0, logratio_chosen=value, logratio_rejected=0.0)])
        assert (wrong_reference(Curves(evaluations=start), DPO) is not None) == is_found
    first = Curves(steps(3, logratio_chosen=0.5, logratio_rejected=0.0))
    assert wrong_reference(first, DPO) is not None
    assert wrong_reference(first, replace(DPO, has_dropout=True)) is None  # its first step is noisy
    assert wrong_reference(Curves(evaluations=Table([pair(5)])), DPO) is None  # behind updates it has to move


def test_saturation_is_all_pairs_right_and_a_loss_that_is_spent() -> None:
    def table(loss: float, accuracy: float) -> Curves:
        return Curves(Table([pair(1, loss=0.69), *(pair(s, loss=loss, accuracy=accuracy) for s in range(2, 30))]))

    found = saturation(table(0.01, 1.0), replace(DPO, epochs=3))
    assert found is not None and found.severity == "notice" and "`epochs: 2` (now 3)" in found.remedy
    assert saturation(table(0.05, 1.0), DPO) is None
    assert saturation(table(0.01, 0.98), DPO) is None


def test_the_budget_of_kl() -> None:
    curves = Curves(evaluations=evaluations("sample_kl", [0.0, 6.0, 12.0]))
    found = kl_over_budget(curves, DPO)
    assert found is not None and "12 nats an answer" in found.evidence and "step 10 was inside it" in found.evidence
    assert "`kl_budget: 18`" in found.remedy
    assert kl_over_budget(curves, replace(DPO, kl_budget=12.0)) is None
    assert kl_over_budget(curves, replace(DPO, kl_budget=None)) is None
    assert kl_over_budget(Curves(evaluations=evaluations("sample_kl", [0.0, 12.0, 6.0])), DPO) is None
