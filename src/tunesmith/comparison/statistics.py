"""How sure a figure is: intervals for shares and means, and for the difference of two stages.

In: one number a row, and the cluster (prompt) that the row belongs to. Out: an estimate with a 95 % interval.
Must not know: models, stages, files.

The intervals say what another draw of prompts could have shown. They say nothing about another training seed.

Shapes: R rows, C clusters, S bootstrap resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Method = Literal["bootstrap", "wilson", "newcombe", "exact", "none"]

LEVEL = 0.95
Z = 1.959963984540054
"""Quantile 0.975 of the normal distribution, for 95 % intervals."""
RARE = 10
"""Below this many of the rarer outcome a bootstrap interval is too narrow (at none it has no width at all)."""
CHUNK = 4_000_000
"""Resampling weights held at a time: 32 MB."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with its 95 % interval; `value` is None where it could not be computed, and `reason` says why.

    num counts rows. method says how the interval was made; exact: the figure holds by definition.
    """

    value: float | None
    low: float | None
    high: float | None
    num: int
    method: Method
    reason: str = ""


def missing(reason: str, num: int = 0) -> Estimate:
    """A figure that could not be computed."""
    return Estimate(None, None, None, num, "none", reason)


def exact(value: float, num: int, reason: str) -> Estimate:
    """A figure that holds by definition, so it has no uncertainty."""
    return Estimate(value, value, value, num, "exact", reason)


def wilson(successes: float, num: int) -> tuple[float, float]:
    """Wilson's score interval of a share (Wilson 1927). Ties may make `successes` a half.

    Unlike the bootstrap it has a width at 0 and 1: of 0 successes in n the upper end is z^2 / (n + z^2).
    """
    share = successes / num
    centre = (share + Z * Z / (2 * num)) / (1 + Z * Z / num)
    half = Z / (1 + Z * Z / num) * math.sqrt(share * (1 - share) / num + Z * Z / (4 * num * num))
    low = 0.0 if successes == 0 else centre - half  # the formula gives these exactly, but for rounding
    high = 1.0 if successes == num else centre + half
    return max(0.0, low), min(1.0, high)


def bootstrap(values_R: Array, clusters: Sequence[str], *, samples: int, seed: int) -> tuple[float, float]:
    """Percentile bootstrap of the mean (Efron 1979), resampling whole clusters.

    Rows of one prompt are alike; drawing prompts and not rows keeps the interval from shrinking with copies.
    """
    names, cluster_R = np.unique(np.asarray(clusters, dtype=object).astype(str), return_inverse=True)
    num_clusters = len(names)
    sum_C = np.bincount(cluster_R, weights=values_R, minlength=num_clusters)
    count_C = np.bincount(cluster_R, minlength=num_clusters).astype(np.float64)
    rng = np.random.default_rng(seed)
    step = max(1, CHUNK // num_clusters)
    means: list[Array] = []
    for start in range(0, samples, step):
        size = min(step, samples - start)
        weight_SC = rng.multinomial(num_clusters, np.full(num_clusters, 1 / num_clusters), size=size)
        means.append((weight_SC @ sum_C) / (weight_SC @ count_C))
    low, high = np.quantile(np.concatenate(means), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def share(values: Sequence[float], clusters: Sequence[str], *, samples: int, seed: int) -> Estimate:
    """A share of wins (1), ties (0.5) and losses (0).

    Bootstrap over prompts; Wilson where the rarer outcome was seen fewer than 10 times, because there the
    bootstrap is too narrow. Wilson counts clusters, not rows, so copies of a prompt do not narrow it.
    """
    if not values:
        return missing("no rows")
    values_R = np.asarray(values, dtype=np.float64)
    mean = float(values_R.mean())
    if min(values_R.sum(), len(values_R) - values_R.sum()) < RARE:
        num_clusters = len(set(clusters))
        low, high = wilson(mean * num_clusters, num_clusters)
        return Estimate(mean, low, high, len(values), "wilson")
    low, high = bootstrap(values_R, clusters, samples=samples, seed=seed)
    return Estimate(mean, low, high, len(values), "bootstrap")


def mean(values: Sequence[float], clusters: Sequence[str], *, samples: int, seed: int) -> Estimate:
    """A mean of any numbers, with a bootstrap interval over prompts; none for fewer than two prompts."""
    if not values:
        return missing("no rows")
    values_R = np.asarray(values, dtype=np.float64)
    value = float(values_R.mean())
    if len(set(clusters)) < 2:
        return Estimate(value, None, None, len(values), "none", "one prompt has no interval")
    low, high = bootstrap(values_R, clusters, samples=samples, seed=seed)
    return Estimate(value, low, high, len(values), "bootstrap")


def newcombe(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Interval of a difference of two paired shares, first minus second (Newcombe 1998, method 10).

    Each share's Wilson limits are added as squares, less their correlation. It has a width even where the two
    stages never disagreed.
    """
    num = len(pairs)
    both = sum(first == 1 and second == 1 for first, second in pairs)
    only_first = sum(first == 1 and second == 0 for first, second in pairs)
    only_second = sum(first == 0 and second == 1 for first, second in pairs)
    neither = num - both - only_first - only_second
    share_1, share_2 = (both + only_first) / num, (both + only_second) / num
    low_1, high_1 = wilson(both + only_first, num)
    low_2, high_2 = wilson(both + only_second, num)
    product = (both + only_first) * (only_second + neither) * (both + only_second) * (only_first + neither)
    cross = float(both * neither - only_first * only_second)
    if cross > 0:
        cross = max(cross - num / 2, 0)  # Newcombe's continuity correction
    correlation = cross / math.sqrt(product) if product else 0.0
    down_1, up_1, down_2, up_2 = share_1 - low_1, high_1 - share_1, share_2 - low_2, high_2 - share_2
    below = math.sqrt(down_1**2 - 2 * correlation * down_1 * up_2 + up_2**2)
    above = math.sqrt(up_1**2 - 2 * correlation * up_1 * down_2 + down_2**2)
    return share_1 - share_2 - below, share_1 - share_2 + above


def difference(
    first: Sequence[float], second: Sequence[float], clusters: Sequence[str], *, samples: int, seed: int
) -> Estimate:
    """Mean of first - second over the same rows, with an interval that knows they are the same rows.

    Bootstrap of the row differences over prompts; Newcombe's method for wins and losses on distinct prompts where
    the stages disagreed in one direction fewer than 10 times, and wherever they never differed.
    """
    assert len(first) == len(second) == len(clusters)
    if not first:
        return missing("no rows")
    deltas_R = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    value = float(deltas_R.mean())
    num = len(first)
    binary = set(first) | set(second) <= {0.0, 1.0}
    few = min((deltas_R > 0).sum(), (deltas_R < 0).sum()) < RARE
    if binary and ((few and len(set(clusters)) == num) or np.ptp(deltas_R) == 0):
        low, high = newcombe(list(zip(first, second, strict=True)))
        return Estimate(value, low, high, num, "newcombe")
    if len(set(clusters)) < 2:
        return Estimate(value, None, None, num, "none", "one prompt has no interval")
    low, high = bootstrap(deltas_R, clusters, samples=samples, seed=seed)
    return Estimate(value, low, high, num, "bootstrap")


def shifted(estimate: Estimate, by: float) -> Estimate:
    """`estimate` less a constant: the difference to a figure that holds by definition."""
    return _mapped(estimate, lambda number: number - by)


def flipped(estimate: Estimate) -> Estimate:
    """The difference the other way round."""
    turned = _mapped(estimate, lambda number: -number)
    return replace(turned, low=turned.high, high=turned.low)


def _mapped(estimate: Estimate, change: Callable[[float], float]) -> Estimate:
    value, low, high = (
        None if number is None else change(number) for number in (estimate.value, estimate.low, estimate.high)
    )
    return replace(estimate, value=value, low=low, high=high)
