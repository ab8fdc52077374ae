"""Intervals, against numbers worked out by hand or taken from the papers' own tables."""

from __future__ import annotations

import numpy as np
import pytest

from tunesmith.comparison.statistics import (
    bootstrap,
    difference,
    exact,
    mean,
    missing,
    newcombe,
    share,
    shifted,
    wilson,
)

DISTINCT = [f"p{number}" for number in range(400)]


def test_wilson_of_half() -> None:
    # p = 0.5, n = 100, z = 1.96: centre 0.5, half = 1.96 / 1.038416 * sqrt(0.0025 + 0.00009604) = 0.0962
    assert wilson(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)


def test_wilson_of_none_and_all() -> None:
    # upper end of 0 of n: z^2 / (n + z^2) = 3.8415 / 103.8415
    assert wilson(0, 100) == pytest.approx((0.0, 0.036994), abs=1e-6)
    assert wilson(100, 100) == pytest.approx((1 - 0.036994, 1.0), abs=1e-6)


def test_bootstrap_of_a_share_is_near_the_normal_interval() -> None:
    values = np.array([1.0] * 200 + [0.0] * 200)
    low, high = bootstrap(values, DISTINCT, samples=4000, seed=0)
    # 0.5 -+ 1.96 * sqrt(0.25 / 400) = 0.5 -+ 0.049
    assert low == pytest.approx(0.451, abs=0.006)
    assert high == pytest.approx(0.549, abs=0.006)


def test_bootstrap_draws_prompts_and_not_rows() -> None:
    values = np.array([1.0, 0.0] * 50)
    rows = bootstrap(values, [f"p{n}" for n in range(100)], samples=2000, seed=0)
    copied = bootstrap(np.repeat(values, 4), [f"p{n // 4}" for n in range(400)], samples=2000, seed=0)
    assert copied == pytest.approx(rows, abs=1e-12)


def test_bootstrap_is_a_function_of_its_seed() -> None:
    values = np.arange(30.0)
    clusters = DISTINCT[:30]
    first = bootstrap(values, clusters, samples=500, seed=1)
    assert bootstrap(values, clusters, samples=500, seed=1) == first
    assert bootstrap(values, clusters, samples=500, seed=2) != first


def test_a_share_of_one_has_a_width() -> None:
    estimate = share([1.0] * 50, DISTINCT[:50], samples=200, seed=0)
    assert (estimate.value, estimate.high, estimate.method) == (1.0, 1.0, "wilson")
    assert estimate.low == pytest.approx(1 - 3.841459 / 53.841459, abs=1e-6)


def test_copies_of_a_prompt_do_not_narrow_a_share_of_one() -> None:
    once = share([1.0] * 10, DISTINCT[:10], samples=200, seed=0)
    copied = share([1.0] * 40, DISTINCT[:10] * 4, samples=200, seed=0)
    assert (copied.low, copied.num) == (once.low, 40)


def test_ties_count_half() -> None:
    assert share([1.0, 0.5, 0.0, 0.5], DISTINCT[:4], samples=200, seed=0).value == 0.5


def test_a_share_in_the_middle_is_bootstrapped() -> None:
    assert share([1.0, 0.0] * 20, DISTINCT[:40], samples=200, seed=0).method == "bootstrap"


def test_newcombe_matches_the_papers_example() -> None:
    # Newcombe 1998, table I: e=36, f=12, g=2, h=0 of 50, method 10: -> 0.0569 to 0.3404
    pairs = [(1.0, 1.0)] * 36 + [(1.0, 0.0)] * 12 + [(0.0, 1.0)] * 2
    assert newcombe(pairs) == pytest.approx((0.0569, 0.3404), abs=2e-4)


def test_two_perfect_stages_still_have_a_width() -> None:
    estimate = difference([1.0] * 100, [1.0] * 100, DISTINCT[:100], samples=200, seed=0)
    assert (estimate.value, estimate.method) == (0.0, "newcombe")
    assert estimate.low == pytest.approx(-0.036994, abs=1e-6)
    assert estimate.high == pytest.approx(0.036994, abs=1e-6)


def test_a_paired_difference_is_narrower_than_an_unpaired_one() -> None:
    first = [1.0] * 120 + [0.0] * 80
    second = [1.0] * 100 + [0.0] * 20 + [0.0] * 65 + [1.0] * 15
    estimate = difference(first, second, DISTINCT[:200], samples=2000, seed=0)
    assert (estimate.method, estimate.value) == ("bootstrap", pytest.approx(0.025))
    assert estimate.low is not None and estimate.high is not None
    # 35 of 200 disagree: sd of a mean = sqrt((0.175 - 0.025^2) / 200) = 0.0295
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * 0.0295, rel=0.1)


def test_a_mean_of_one_prompt_has_no_interval() -> None:
    estimate = mean([3.0, 5.0], ["p", "p"], samples=200, seed=0)
    assert (estimate.value, estimate.low, estimate.method) == (4.0, None, "none")


def test_no_rows_give_no_figure() -> None:
    for estimate in (share([], [], samples=200, seed=0), mean([], [], samples=200, seed=0), missing("no rows")):
        assert (estimate.value, estimate.reason) == (None, "no rows")


def test_a_shifted_estimate_keeps_its_width() -> None:
    estimate = shifted(share([1.0, 0.0] * 20, DISTINCT[:40], samples=200, seed=0), 0.5)
    assert estimate.value == 0.0
    assert estimate.low is not None and estimate.low < 0
    assert exact(0.5, 7, "why").method == "exact"
