"""What a person should read about a stage's rows: lengths, what was dropped, what repeats.

In: a finished build. Out: lines of text; those that need attention begin with WARNING. Must not know: files, trees.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from tunesmith.data.build import NUM_NAMED, SideFigures, StageBuild

HISTOGRAM_EDGES = (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
COVERED = 0.99
"""Share of the rows that a proposed `max_length` keeps: the last percent of a long tail costs much memory."""
LENGTH_STEP = 64  # proposals are rounded up to a multiple of this


def closing_notes(build: StageBuild, max_length: int) -> list[str]:
    """The lines about all rows of a stage."""
    notes = [note for side in build.sides.values() for note in _dropped(side)]
    notes += _lengths(build.sides["train"], max_length)
    repeated = build.num_repeated()
    num_train = build.sides["train"].num_kept
    if repeated:
        notes.append(f"{repeated} of {num_train} training rows repeat an earlier one; all are trained.")
    if build.num_merged:
        notes.append(f"{build.num_merged} training rows repeat an earlier one and were merged into it.")
    if build.num_leaked:
        notes.append(f"WARNING: {build.num_leaked} training rows are held out as well; they are not trained.")
    num_leaked, named = build.leaked_prompts()
    if num_leaked:
        notes.append(
            f"WARNING: {num_leaked} of {build.sides['heldout'].num_kept} held-out rows have a prompt that is also "
            f"trained ({', '.join(named)}{', ...' if num_leaked > NUM_NAMED else ''})."
        )
    return notes


def _dropped(side: SideFigures) -> list[str]:
    """One loud line for each kind of reason that dropped rows."""
    notes = []
    for kind, count in sorted(side.dropped.items()):
        named = ", ".join(side.named.get(kind, []))
        more = ", ..." if named and count > NUM_NAMED else ""
        rows = f" ({named}{more})" if named else ""
        notes.append(f"WARNING: {count} of {side.num_rows} {side.split} rows dropped, {kind}{rows}.")
    return notes


def _lengths(side: SideFigures, max_length: int) -> list[str]:
    """Percentiles of the training rows' lengths, and the `max_length` that they suggest."""
    lengths = side.row_lengths()
    if not len(lengths):
        return []
    middle, most, nearly_all = (int(value) for value in np.percentile(lengths, (50, 95, 99)))
    text = f"lengths of the training rows in tokens: median {middle:,}, 95 % {most:,}, 99 % {nearly_all:,}"
    text += f", longest {int(lengths.max()):,}"
    return [f"{text}; `max_length: {proposed_length(lengths)}` would keep 99 % of them (it is {max_length})."]


def proposed_length(lengths: npt.NDArray[np.int32]) -> int:
    """The smallest multiple of 64 that keeps 99 % of the rows."""
    wanted = int(np.percentile(lengths, 100 * COVERED, method="higher"))
    return -(-wanted // LENGTH_STEP) * LENGTH_STEP


def histogram(lengths: Sequence[int]) -> str:
    """Row lengths in tokens, one line a power of two."""
    edges = (0, *HISTOGRAM_EDGES, max(*lengths, HISTOGRAM_EDGES[-1]) + 1)
    lines = []
    for low, high in pairwise(edges):
        count = sum(low < length <= high for length in lengths)
        if count:
            lines.append(f"    {low + 1:>6} to {min(high, max(lengths)):>6} tokens: {count} rows")
    return "\n".join(lines)
