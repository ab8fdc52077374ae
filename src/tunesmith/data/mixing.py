"""Several sources in given proportions.

In: every training row's source and content key, a weight a source. Out: which rows are drawn, and their order.
Pure functions of their arguments. Must not know: files, trees, tokenizers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.int64]


def shares(counts: Sequence[int], weights: Sequence[float]) -> list[int]:
    """Rows to draw from each source: in proportion to the weights, as many as the shortest source allows.

    The source that is shortest for its weight is drawn whole; none is drawn twice.
    """
    epoch = min((count / weight for count, weight in zip(counts, weights, strict=True)), default=0.0)
    return [min(count, round(epoch * weight)) for count, weight in zip(counts, weights, strict=True)]


def drawn_rows(numbers: Numbers, keys: npt.NDArray[np.uint64], weights: Sequence[float]) -> npt.NDArray[np.bool_]:
    """Which rows are drawn: of every source those with the smallest content keys, so that a row stays drawn or not
    whatever stands around it, as long as its source's share does not change."""
    drawn = np.zeros(len(numbers), np.bool_)
    counts = [int((numbers == number).sum()) for number in range(len(weights))]
    for number, share in enumerate(shares(counts, weights)):
        rows = np.flatnonzero(numbers == number)
        drawn[rows[np.argsort(keys[rows], kind="stable")[:share]]] = True
    return drawn


def interleaved(numbers: Numbers, drawn: npt.NDArray[np.bool_]) -> Numbers:
    """The drawn rows in an order in which every stretch holds the sources in their proportions.

    Row i of a source's k stands at (i + 1/2) / k of the epoch.
    """
    rows = np.flatnonzero(drawn)
    place = np.zeros(len(rows))
    for number in np.unique(numbers[rows]):
        mine = np.flatnonzero(numbers[rows] == number)
        place[mine] = (np.arange(len(mine)) + 0.5) / len(mine)
    return rows[np.lexsort((numbers[rows], place))]
