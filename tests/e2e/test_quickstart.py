"""The figures that the quickstart promises, read from the run that `make quickstart` left behind.

.ci/run calls this after the quickstart; it skips where there is no such run, since training it takes minutes.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

Figures = dict[str, dict[str, dict[str, float]]]


@pytest.fixture(scope="module")
def run(project: Path) -> Path:
    folder = project / "runs/quickstart"
    if not (folder / "compare/summary.json").is_file():
        pytest.skip("no runs/quickstart: `make quickstart` makes it")
    return folder


@pytest.fixture(scope="module")
def figures(run: Path) -> Figures:
    stages: Figures = json.loads((run / "compare/summary.json").read_text())["stages"]
    return stages


def _value(figures: Figures, stage: str, name: str) -> float:
    figure = figures[stage][name]
    assert figure["low"] <= figure["value"] <= figure["high"]
    return figure["value"]


def test_the_base_knows_but_cannot_answer_and_sft_teaches_it(figures: Figures) -> None:
    assert _value(figures, "base", "exact_accuracy") <= 0.05
    assert _value(figures, "sft", "exact_accuracy") >= 0.85
    assert _value(figures, "base", "value_accuracy") < _value(figures, "sft", "value_accuracy")


def test_dpo_keeps_what_sft_taught(figures: Figures) -> None:
    assert _value(figures, "dpo", "exact_accuracy") >= _value(figures, "sft", "exact_accuracy") - 0.03


def test_dpo_ranks_held_out_pairs_right(figures: Figures) -> None:
    assert _value(figures, "dpo", "preference_accuracy") >= 0.90
    assert _value(figures, "sft", "preference_accuracy") == 0.5
    assert _value(figures, "dpo", "logprob_accuracy") > _value(figures, "sft", "logprob_accuracy")


def test_dpo_moves_the_style(figures: Figures) -> None:
    before, after = _value(figures, "sft", "style_share"), _value(figures, "dpo", "style_share")
    assert 0.35 <= before <= 0.65
    assert after >= before + 0.30


def test_kl_is_zero_at_the_reference_and_bounded_after_dpo(figures: Figures) -> None:
    assert _value(figures, "sft", "kl") == 0
    assert 0 < _value(figures, "dpo", "kl") < 10


def test_the_length_does_not_decide_the_pairs(run: Path) -> None:
    records = [json.loads(line) for line in (run / "stages/dpo/metrics.jsonl").read_text().splitlines()]
    chosen = sum(record["tokens_chosen"] * record["num_examples"] for record in records)
    rejected = sum(record["tokens_rejected"] * record["num_examples"] for record in records)
    assert chosen / rejected == pytest.approx(1, abs=0.1)


def test_the_report_opens_offline(run: Path) -> None:
    text = (run / "report.html").read_text()
    assert "Content-Security-Policy" in text
    assert "<script" not in text
    assert all(mark not in text for mark in ('src="http', 'href="http', "url(http"))
