"""Chart geometry: ticks, labels that never overlap, and lines that say what the records say."""

from __future__ import annotations

import math

import pytest

from tunesmith.comparison.charts import (
    HEIGHT,
    LABEL_GAP,
    LEFT,
    MAX_POINTS,
    RIGHT,
    WIDTH,
    Series,
    finite,
    line_chart,
    nice_ticks,
    short,
    smoothed,
    spread,
    thinned,
    whiskers,
)
from tunesmith.comparison.curves import points, stage_charts
from tunesmith.comparison.statistics import Estimate, missing


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 1, [0, 0.5, 1]),
        (0, 100, [0, 50, 100]),
        (0.2, 3.9, [0, 1, 2, 3, 4]),
        (-14.8, 0.3, [-15, -10, -5, 0, 5]),
        (0, 0.0015, [0, 0.0005, 0.001, 0.0015]),
    ],
)
def test_ticks_are_round_and_span_the_data(low: float, high: float, ticks: list[float]) -> None:
    assert nice_ticks(low, high, 4) == pytest.approx(ticks)


@pytest.mark.parametrize("value", [0.0, 3.0, -3.0, 1e-9])
def test_a_constant_line_still_has_an_axis(value: float) -> None:
    ticks = nice_ticks(value, value, 4)
    assert len(ticks) >= 2 and ticks[0] <= value <= ticks[-1]


def test_labels_move_apart_and_stay_inside() -> None:
    assert spread([10, 12, 50], gap=15, low=0, high=100) == [10, 25, 50]
    assert spread([99, 98], gap=15, low=0, high=100) == [100, 85]


def test_a_chart_maps_its_ends_to_its_frame() -> None:
    chart = line_chart("Loss", [Series("trained", [(0, 4.0), (100, 0.0)], "trained")], unit="nats")
    assert chart is not None
    (line,) = chart.lines
    assert line.path == f"M{LEFT:g} 10L{WIDTH - RIGHT:g} {HEIGHT - 30:g}"
    assert line.end == (WIDTH - RIGHT, HEIGHT - 30)
    assert chart.description == "Loss, nats, over steps 0 to 100: trained from 4 to 0."


def test_names_of_lines_that_end_together_do_not_overlap() -> None:
    same = [(0.0, 1.0), (10.0, 0.5)]
    chart = line_chart("Loss", [Series("a", same, "a"), Series("b", same, "b")], unit="nats")
    assert chart is not None
    assert abs(chart.lines[0].label_y - chart.lines[1].label_y) >= LABEL_GAP


def test_nothing_finite_gives_no_chart() -> None:
    assert line_chart("Loss", [Series("a", [(1, math.nan)], "a"), Series("b", [], "b")], unit="nats") is None
    assert finite([(1, 2), (2, math.inf)]) == [(1, 2)]


def test_long_lines_are_thinned_by_means_and_keep_their_end() -> None:
    found = thinned([(float(x), float(x)) for x in range(10_000)])
    assert len(found) <= MAX_POINTS + 1
    assert found[0] == (12.0, 12.0)  # the mean of 0 to 24
    assert found[-1] == (9999.0, 9999.0)


def test_a_running_mean_keeps_both_ends() -> None:
    raw = [(float(x), float(x % 2)) for x in range(41)]
    means = smoothed(raw)
    assert means[0] == raw[0] and means[-1] == raw[-1]
    assert means[20] == (20.0, 0.4)  # steps 18 to 22: 0 1 0 1 0


def test_short_numbers() -> None:
    numbers = (0, 0.5, 1500, -2, 0.00015, 123456, 0.034567)
    assert [short(x) for x in numbers] == ["0", "0.5", "1500", "−2", "1.5e−4", "1.2e5", "0.03457"]
    assert short(0.71113, digits=3) == "0.711"


def test_whiskers_stand_where_their_numbers_are() -> None:
    dots = whiskers([("a", Estimate(0.5, 0.4, 0.75, 9, "bootstrap")), ("b", missing("none"))], is_share=True)
    assert [(dot.css, dot.at, dot.low, dot.high) for dot in dots] == [("a", 50.0, 40.0, 75.0)]
    (alone,) = whiskers([("a", Estimate(2.0, None, None, 1, "none"))], is_share=False)
    assert (alone.low, alone.high) == (None, None)
    assert whiskers([("b", missing("none"))], is_share=True) == ()


def test_a_stages_charts_follow_its_records() -> None:
    metrics = [{"step": step, "loss": 1.0, "lr": 1e-3, "grad_norm": None} for step in (1, 2)]
    titles = [chart.title for chart in stage_charts(metrics, [], is_preference=False, has_replay=True)]
    assert titles == ["Loss", "Learning rate"]
    preference = [{"step": 1, "loss": 0.69, "margin": 0.0, "accuracy": 0.5, "lr": 1e-4}]
    titles = [chart.title for chart in stage_charts(preference, preference, is_preference=True, has_replay=False)]
    assert titles == ["Loss", "Margin of implicit rewards", "Pairs ranked right", "Learning rate"]


def test_points_skip_records_without_the_number() -> None:
    assert points([{"step": 1, "x": 2}, {"step": 2, "x": None}, {"x": 3}], "x", 10) == [(1.0, 20.0)]
