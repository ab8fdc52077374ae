"""The search of `tunesmith calibrate` by hand: where it looks, when it stops, what it recommends, and its page."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest

from tunesmith.pipeline.calibrate_page import page
from tunesmith.pipeline.calibrate_search import (
    Limits,
    Place,
    Probe,
    choose,
    coarse_places,
    excess,
    figures_of,
    next_places,
    values_at,
)

LIMITS = Limits(kl=4.0, fall=0.1)


def probe(place: Place = (0, 0), accuracy: float | None = 0.8, spread: float = 1.0, kl: float = 1.0) -> Probe:
    rate, beta = values_at(place, learning_rate=1e-4, beta=0.1)
    return Probe(place, rate, beta, 1.0, 0.6, 100, accuracy, spread, 0.0, kl)


def test_the_grid_has_half_decades_around_the_recipes_values() -> None:
    assert values_at((0, 0), learning_rate=2.5e-4, beta=0.123) == (2.5e-4, 0.123)
    assert values_at((-2, 1), learning_rate=2e-4, beta=0.1) == (2e-5, 0.32)
    assert values_at((1, 0), learning_rate=2e-4, beta=None) == (6.3e-4, None)
    assert len(coarse_places(searches_beta=True)) == 9
    assert coarse_places(searches_beta=False) == [(-2, 0), (0, 0), (2, 0)]


def test_the_search_goes_on_around_its_choice_until_that_stands() -> None:
    probes = [probe((-2, 0), 0.6), probe((0, 0), 0.8), probe((2, 0), 0.5)]
    assert next_places(probes, LIMITS, searches_beta=False) == [(-1, 0), (1, 0)]
    probes += [probe((-1, 0), 0.7), probe((1, 0), 0.9)]
    assert next_places(probes, LIMITS, searches_beta=False) == []  # both neighbours of (1, 0) are known
    around = [(0, -1), (0, 1), (1, -1), (1, 1), (2, -1), (2, 1)]
    assert next_places(probes, LIMITS, searches_beta=True) == around
    edge = [probe((2, 2), 0.9)]
    assert next_places(edge, LIMITS, searches_beta=True) == [(1, 1), (1, 2), (2, 1)]


def test_of_those_as_accurate_as_the_best_the_one_that_moved_the_margin_most() -> None:
    # standard error of 0.8 over 100 rows: sqrt(0.8 * 0.2 / 100) = 0.04
    best, near, far, over = (
        probe((0, 0), 0.80, 1.0),
        probe((1, 0), 0.77, 3.0),
        probe((2, 0), 0.75, 9.0),
        probe((2, 1), 0.95, 9.0, kl=5.0),
    )
    choice = choose([best, near, far, over], LIMITS)
    assert (choice.probe, choice.within) == (near, True)
    assert "standard error (0.040) of the highest (0.800)" in choice.why


def test_without_accuracy_the_lowest_loss_is_chosen() -> None:
    low = replace(probe((1, 0), None), loss=0.4)
    assert choose([probe((0, 0), None), low], LIMITS).probe == low


def test_where_none_keeps_the_limits_the_least_excess_is_chosen_and_said() -> None:
    probes = [probe((0, 0), kl=9.0), probe((1, 0), kl=5.0), replace(probe((2, 0)), problem="the loss is no number")]
    choice = choose(probes, LIMITS)
    assert (choice.probe, choice.within) == (probes[1], False)
    assert list(excess(probes[1], LIMITS)) == ["KL 5 > 4"]
    assert list(excess(replace(probe(), fall=0.2), LIMITS)) == ["the chosen answers fall by 0.2 nats a token > 0.1"]
    assert list(excess(probe(), LIMITS)) == []
    assert list(excess(replace(probe(), kl=math.nan), LIMITS)) == ["KL nan > 4"]


def test_figures_are_free_of_beta_and_a_fall_is_of_a_token() -> None:
    first = {"step": 0, "logprob_chosen": -20.0}
    last = {
        "loss": 0.5,
        "num_examples": 64,
        "accuracy": 0.75,
        "margin": 0.6,
        "logprob_chosen": -25.0,
        "tokens_chosen": 10.0,
    }
    assert figures_of(first, last, beta=0.3) == {
        "loss": 0.5,
        "num_heldout": 64,
        "accuracy": 0.75,
        "spread": pytest.approx(2.0),
        "fall": 0.5,
    }
    bare = figures_of({"loss": 1.0}, {"loss": 0.5, "num_examples": 4}, beta=None)
    assert bare == {"loss": 0.5, "num_heldout": 4, "accuracy": None, "spread": None, "fall": None}


def test_the_page_is_whole_in_itself_and_escapes_what_it_shows() -> None:
    probes = [probe((0, 0)), probe((2, 0), 0.5, kl=9.0), replace(probe((0, 2)), problem="lost <b>")]
    shown = page("a<b", ["x < y"], probes, choose(probes, LIMITS), LIMITS)
    assert not re.search(r"https?://|<script|<link|src=", shown)
    assert "a&lt;b" in shown
    assert "x &lt; y" in shown
    assert "lost &lt;b&gt;" in shown
    assert shown.count('class="best"') == 2  # a cell and a point
    assert shown.count("<circle") == 4  # three points, one of them ringed
    nothing = [replace(each, kl=None, accuracy=None) for each in probes]
    assert "<circle" not in page("a", [], nothing, choose(nothing, LIMITS), LIMITS)
