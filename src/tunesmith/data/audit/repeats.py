"""Rows that say the same thing twice: duplicates, near duplicates, repeated prompts.

In: a subject. Out: findings. Must not know: files, how findings are shown.
"""

from __future__ import annotations

from collections.abc import Sequence

from tunesmith.data.audit.findings import Finding
from tunesmith.data.audit.near import THRESHOLD, NearPair, clusters, jaccard
from tunesmith.data.audit.subject import Subject, by_share, plural, share
from tunesmith.data.audit.texts import answers_text, prompt_text
from tunesmith.data.types import Example


def repeated(keys: Sequence[str]) -> dict[int, int]:
    """Places whose key stood before, and the place where it first stood."""
    first: dict[str, int] = {}
    return {place: first[key] for place, key in enumerate(keys) if first.setdefault(key, place) != place}


def duplicates(subject: Subject) -> list[Finding]:
    """Rows equal to an earlier one in all that a loss could see of them.

    warning: such a row counts twice in the loss; blocker from a fifth of the rows on; note below one in a thousand.
    """
    found = repeated(subject.row_keys)
    if not found:
        return []
    total = len(subject.examples)
    return [
        subject.finding(
            "duplicates",
            "exact duplicates",
            by_share(len(found), total, warning=0.001, blocker=0.2),
            sorted(found),
            f"{share(len(found), total)} rows repeat an earlier row word for word; each counts again in the loss.",
            notes={place: f"= {subject.examples[before].id}" for place, before in found.items()},
        )
    ]


def near_groups(subject: Subject) -> list[tuple[list[int], dict[int, NearPair]]]:
    """Groups of training rows that are nearly but not exactly the same; beside each the closest pair of a member."""
    num, exact = len(subject.examples), repeated(subject.row_keys)
    pairs = [
        pair
        for pair in subject.near
        if pair.second < num
        and pair.first not in exact
        and pair.second not in exact
        and _alike_answers(subject, subject.examples[pair.first], subject.examples[pair.second])
    ]
    closest: dict[int, NearPair] = {}
    for pair in sorted(pairs, key=lambda pair: pair.similarity):
        closest[pair.first] = closest[pair.second] = pair
    return [(group, {place: closest[place] for place in group}) for group in clusters(pairs)]


def _alike_answers(subject: Subject, one: Example, two: Example) -> bool:
    """A long shared prompt does not make two rows alike: their answers must be."""
    shingles = subject.words.shingles
    return jaccard(shingles(answers_text(one)), shingles(answers_text(two))) >= THRESHOLD


def near_duplicates(subject: Subject) -> list[Finding]:
    """Rows alike to an earlier one: Jaccard similarity of 3-word shingles >= 0.7, of the row and of its answers.

    note below 1 % of the rows, warning from there on, blocker from half of them on.
    """
    groups = near_groups(subject)
    if not groups:
        return []
    total = len(subject.examples)
    notes: dict[int, str] = {}
    for group, closest in groups:
        for place in group[1:]:
            pair = closest[place]
            other = pair.first if pair.second == place else pair.second
            notes[place] = f"{pair.similarity:.0%} like {subject.examples[other].id}"
    places = sorted(notes)
    largest = max(len(group) for group, _ in groups)
    text = (
        f"{share(len(places), total)} rows are nearly the same as another (Jaccard similarity of 3-word shingles >= "
        f"{THRESHOLD}): {plural(len(groups), 'group')}, the largest of {largest} rows."
    )
    severity = by_share(len(places), total, warning=0.01, blocker=0.5)
    return [subject.finding("near-duplicates", "near duplicates", severity, places, text, notes=notes)]


def repeated_prompts(subject: Subject) -> list[Finding]:
    """Rows with the prompt of an earlier row and another answer.

    For single answers a warning from 1 % of the rows on: the loss pulls both ways. For pairs a note: several pairs a
    prompt are common, but they weigh more than the others. Plain text has no prompt.
    """
    first: dict[str, int] = {}
    exact = repeated(subject.row_keys)
    notes: dict[int, str] = {}
    for place, (example, key) in enumerate(zip(subject.examples, subject.prompt_keys, strict=True)):
        if place in exact or not example.prompt or example.label is not None:
            continue
        if (before := first.setdefault(key, place)) != place:
            notes[place] = f"prompt of {subject.examples[before].id}: {prompt_text(example)}"
    if not notes:
        return []
    total = len(subject.examples)
    pairs = len(subject.examples[next(iter(notes))].answers) > 1
    severity = "note" if pairs else by_share(len(notes), total, warning=0.01)
    what = "other answers; such prompts weigh more" if pairs else "another answer; the loss pulls both ways"
    text = f"{share(len(notes), total)} rows have the prompt of an earlier row with {what}."
    title = "repeated prompts"
    options = "" if pairs else None
    return [subject.finding("repeated-prompts", title, severity, sorted(notes), text, notes=notes, options=options)]
