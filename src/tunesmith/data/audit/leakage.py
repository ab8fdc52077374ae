"""Rows that are trained and also measured on.

In: a subject with held-out rows or evaluation sets. Out: findings, and the training rows to leave out.
Must not know: files, how findings are shown.

Three ways, from sure to likely: the same prompt; a near duplicate (`near.py`); a shared run of 13 words, as Brown et
al. 2020 (GPT-3, appendix C) look for overlap with benchmarks. Like them, runs that stand in more than 10 training rows
are taken for boilerplate and do not count.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tunesmith.data.audit.findings import NUM_SHOWN, Finding, Hit, Mend
from tunesmith.data.audit.near import Hashes, NearPair
from tunesmith.data.audit.subject import HELDOUT, Subject, share
from tunesmith.data.audit.texts import body_text, prompt_key
from tunesmith.data.types import Example

NGRAM_WORDS = 13
MAX_ROWS_OF_NGRAM = 10
CHUNK = 2048
WAYS = SAME, NEAR, PASSAGE = "same prompt as", "nearly the same as", f"{NGRAM_WORDS} words in a row shared with"


@dataclass(frozen=True, slots=True)
class Leak:
    """A row of a side, a training row that gives it away, and how."""

    place: int
    train: int
    how: str


def leaks(subject: Subject, name: str) -> list[Leak]:
    """Every (row of the side, training row) that belong together, the surest way of each; in the side's order."""
    side = subject.sides[name]
    found: dict[tuple[int, int], str] = {}
    for place, train in _same_prompt(subject, side):
        found[place, train] = SAME
    for pair in _near(subject, name):
        found.setdefault((pair.first, pair.second), NEAR)
    for place, train in _passages(subject, side):
        found.setdefault((place, train), PASSAGE)
    return [Leak(place, train, how) for (place, train), how in sorted(found.items())]


def leakage(subject: Subject) -> list[Finding]:
    """Held-out rows, or rows of an evaluation set, that are trained.

    blocker where a prompt is the same or a row nearly is: its figure is no measure any more; a warning where rows only
    share a passage of 13 words.
    """
    findings = []
    for name, side in subject.sides.items():
        found = leaks(subject, name)
        if not found:
            continue
        first: dict[int, Leak] = {}
        for leak in sorted(found, key=lambda leak: WAYS.index(leak.how)):
            first.setdefault(leak.place, leak)
        ways = [leak.how for leak in first.values()]
        words = ((SAME, "the same prompt"), (NEAR, "nearly the same text"), (PASSAGE, f"{NGRAM_WORDS} words in a row"))
        said = ", ".join(f"{word} {ways.count(way):,}" for way, word in words if way in ways)
        rows = "held-out rows" if name == HELDOUT else f"rows of {name}"
        places = sorted(first, key=lambda place: (WAYS.index(first[place].how), place))  # the surest first
        findings.append(
            Finding(
                kind="leakage",
                title="leakage" if name == HELDOUT else f"leakage of {name}",
                severity="warning" if set(ways) == {PASSAGE} else "blocker",
                count=len(first),
                total=len(side),
                ids=tuple(side[place].id for place in places),
                text=f"{share(len(first), len(side))} {rows} share something with the training rows: {said}.",
                mends=_mends(subject, name, {leak.train for leak in found}),
                shown=tuple(_hit(subject, side, first[place]) for place in places[:NUM_SHOWN]),
            )
        )
    return findings


def _hit(subject: Subject, side: Sequence[Example], leak: Leak) -> Hit:
    return Hit(side[leak.place].id, f"{leak.how} {subject.examples[leak.train].id}")


def _mends(subject: Subject, name: str, trained: set[int]) -> tuple[Mend, ...]:
    """Leaves out the training rows; those that `heldout_fraction` set aside come from the same file."""
    paths = subject.heldout_paths if name == HELDOUT else [name]
    against = "".join(f" --against {shlex.quote(path)}" for path in paths)
    return subject.mends(f"--drop leakage{against}" if against else "--drop near-duplicates", sorted(trained))


def _same_prompt(subject: Subject, side: Sequence[Example]) -> Iterator[tuple[int, int]]:
    trained: dict[str, list[int]] = {}
    for train, key in enumerate(subject.prompt_keys):
        trained.setdefault(key, []).append(train)
    for place, example in enumerate(side):
        yield from ((place, train) for train in trained.get(prompt_key(example), ()))


def _near(subject: Subject, name: str) -> list[NearPair]:
    """Near pairs of a training row and a row of this side, as (place in the side, training row)."""
    num = len(subject.examples)
    start = num
    for other, side in subject.sides.items():
        if other == name:
            break
        start += len(side)
    end = start + len(subject.sides[name])
    return [
        NearPair(pair.second - start, pair.first, pair.similarity)
        for pair in subject.near
        if pair.first < num and start <= pair.second < end
    ]


def _passages(subject: Subject, side: Sequence[Example]) -> Iterator[tuple[int, int]]:
    """(place in the side, training row) that share a run of 13 words that few training rows hold."""
    grams, places = _index([_ngrams(subject, example) for example in side])
    if not len(grams):
        return
    known = np.unique(grams)
    rows: list[npt.NDArray[np.int64]] = []
    hits: list[Hashes] = []
    for start in range(0, len(subject.examples), CHUNK):
        here, train = _index([_ngrams(subject, example) for example in subject.examples[start : start + CHUNK]])
        shared = np.isin(here, known)
        hits.append(here[shared])
        rows.append(train[shared] + start)
    hit, row = np.concatenate(hits), np.concatenate(rows)
    values, counts = np.unique(hit, return_counts=True)
    rare = np.isin(hit, values[counts <= MAX_ROWS_OF_NGRAM])
    trained: dict[int, list[int]] = {}
    for gram, train_row in zip(hit[rare].tolist(), row[rare].tolist(), strict=True):
        trained.setdefault(gram, []).append(train_row)
    seen: set[tuple[int, int]] = set()
    for place, gram in zip(places.tolist(), grams.tolist(), strict=True):
        for train_row in trained.get(gram, ()):
            if (place, train_row) not in seen:
                seen.add((place, train_row))
                yield place, train_row


def _ngrams(subject: Subject, example: Example) -> Hashes:
    """The set of a row's runs of 13 words; none where it has fewer words."""
    grams = subject.words.ngrams(body_text(example), NGRAM_WORDS, whole_only=True)
    return np.unique(grams)


def _index(sets: Sequence[Hashes]) -> tuple[Hashes, npt.NDArray[np.int64]]:
    """All members of the sets in one array, and the set that each is from."""
    flat = np.concatenate([np.zeros(0, dtype=np.uint64), *sets])
    return flat, np.repeat(np.arange(len(sets)), [len(members) for members in sets])
