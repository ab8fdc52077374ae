"""What `max_length` costs.

In: a subject with token counts. Out: findings and facts. Must not know: tokenizers, files, how findings are shown.
"""

from __future__ import annotations

import numpy as np

from tunesmith.data.audit.findings import Fact, Finding
from tunesmith.data.audit.subject import Subject, by_share, share
from tunesmith.data.audit.texts import body_text

STEP = 64  # proposed lengths are multiples of it


def truncation(subject: Subject) -> list[Finding]:
    """Rows longer than `max_length`: how many, and the tokens that dropping or cutting them loses.

    note below 1 % of the rows, warning from there on, blocker from a fifth on.
    """
    over = [place for place, length in enumerate(subject.lengths) if length > subject.max_length]
    if not over or not subject.max_length:
        return []
    total = sum(subject.lengths)
    dropped = sum(subject.lengths[place] for place in over)
    cut = dropped - subject.max_length * len(over)
    longest = max(subject.lengths)
    ample = _rounded(float(np.percentile(np.asarray(subject.lengths), 99)))
    text = (
        f"{share(len(over), len(subject.lengths))} rows are longer than max_length {subject.max_length:,}: dropping "
        f"them loses {share(dropped, total)} tokens, cutting them {share(cut, total)}."
    )
    keeps = f"max_length: {ample}  # keeps 99 % of the rows; {_rounded(longest)} keeps all"
    fix = (
        keeps
        if subject.max_length < ample < _rounded(longest)
        else f"max_length: {_rounded(longest)}  # keeps every row"
    )
    notes = {place: f"{subject.lengths[place]:,} tokens" for place in over}
    severity = by_share(len(over), len(subject.lengths), warning=0.01, blocker=0.2)
    over.sort(key=lambda place: -subject.lengths[place])
    return [subject.finding("truncation", "over-long rows", severity, over, text, notes=notes, options="", advice=fix)]


def length_facts(subject: Subject) -> list[Fact]:
    """Percentiles of the row lengths, in tokens where they are known, else in characters."""
    lengths = list(subject.lengths) or [len(body_text(example)) for example in subject.examples]
    if not lengths:
        return []
    unit = "tokens" if subject.lengths else "characters"
    middle, high = (int(value) for value in np.percentile(np.asarray(lengths), (50, 95)))
    return [Fact(f"{unit} a row", f"median {middle:,}, 95 % up to {high:,}, longest {max(lengths):,}")]


def _rounded(length: float) -> int:
    return -(-int(length) // STEP) * STEP
