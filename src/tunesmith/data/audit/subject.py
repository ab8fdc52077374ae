"""What an audit looks at, and how a check says what it found.

In: examples of the training and held-out side, evaluation sets, token counts. Out: a subject that caches what several
checks need, and findings with ids, masked excerpts and the command that mends them.
Must not know: single checks, how findings are shown.
"""

from __future__ import annotations

import unicodedata
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from tunesmith.data.audit.findings import NUM_SHOWN, Finding, Hit, Mend, Severity
from tunesmith.data.audit.identify import identifier
from tunesmith.data.audit.near import NearPair, Words, near_pairs
from tunesmith.data.audit.private import mask
from tunesmith.data.audit.texts import best_answer, body_text, prompt_key
from tunesmith.data.split import content_key
from tunesmith.data.types import Example

MAX_EXCERPT = 110  # characters of a row in a table: enough to know it by
MAX_MASKED = 20_000  # characters of a row that are masked before the excerpt is cut from them
HELDOUT = "the held-out rows"


@dataclass(frozen=True, slots=True)
class Lost:
    """A row that gave no example: its id, why, and the source that it is from."""

    id: str
    reason: str
    path: str = ""


@dataclass(frozen=True, slots=True)
class SourceRange:
    """A source of the training rows, and the place of its first example."""

    path: str
    start: int


@dataclass(frozen=True)
class Subject:
    """The rows of one audit. `examples` are the training rows; all checks speak of them unless they say otherwise."""

    examples: Sequence[Example]
    heldout: Sequence[Example] = ()
    evaluations: Mapping[str, Sequence[Example]] = field(default_factory=dict)
    lengths: Sequence[int] = ()
    max_length: int = 0
    lost: Sequence[Lost] = ()
    unfit: Sequence[Lost] = ()
    sources: Sequence[SourceRange] = ()
    heldout_paths: Sequence[str] = ()

    @property
    def num_rows(self) -> int:
        """Training rows that were read, the lost and the unfit ones included."""
        return len(self.examples) + len(self.lost) + len(self.unfit)

    @cached_property
    def words(self) -> Words:
        """The table of word hashes, shared by all checks."""
        return Words()

    @cached_property
    def row_keys(self) -> list[str]:
        """What makes two training rows exact duplicates."""
        return [content_key(example) for example in self.examples]

    @cached_property
    def prompt_keys(self) -> list[str]:
        """What makes two training rows share a prompt."""
        return [prompt_key(example) for example in self.examples]

    @cached_property
    def sides(self) -> dict[str, Sequence[Example]]:
        """Rows that must not be trained on, by name."""
        named = dict(self.evaluations)
        return {HELDOUT: self.heldout, **named} if self.heldout else named

    @cached_property
    def spoken(self) -> list[str]:
        """The language of each row's answer, "" where it is too short to tell."""
        return [identifier().language(best_answer(example)) for example in self.examples]

    @cached_property
    def near(self) -> list[NearPair]:
        """Near pairs over the training rows and, after them, those of every side, in the order of `sides`."""
        rows = [*self.examples, *(example for side in self.sides.values() for example in side)]
        return near_pairs([body_text(example) for example in rows], self.words)

    def finding(
        self,
        kind: str,
        title: str,
        severity: Severity,
        places: Sequence[int],
        text: str,
        *,
        notes: Mapping[int, str] | None = None,
        options: str | None = None,
        advice: str = "",
        total: int | None = None,
    ) -> Finding:
        """A finding on training rows at these places; `notes` are excerpts, masked here.

        `options` of `data fix` mend it, `--drop KIND` where None, nothing where "".
        """
        mending = f"--drop {kind}" if options is None else options
        shown = tuple(
            Hit(self.examples[place].id, excerpt((notes or {}).get(place, ""))) for place in places[:NUM_SHOWN]
        )
        return Finding(
            kind=kind,
            title=title,
            severity=severity,
            count=len(places),
            total=len(self.examples) if total is None else total,
            ids=tuple(self.examples[place].id for place in places),
            text=text,
            mends=self.mends(mending, places) if mending else (),
            advice=advice,
            shown=shown,
        )

    def lost_finding(
        self, kind: str, title: str, severity: Severity, places: Sequence[int], lost: Sequence[Lost], text: str
    ) -> Finding:
        """A finding on training rows at these places and on rows that gave no example."""
        found = self.finding(kind, title, severity, places, text, total=self.num_rows)
        paths = dict.fromkeys(row.path for row in lost if row.path)
        mends = [*(Mend(path, f"--drop {kind}") for path in paths), *found.mends]
        return replace(
            found,
            count=len(lost) + len(places),
            ids=(*(row.id for row in lost), *found.ids),
            mends=tuple(dict.fromkeys(mends)),
            shown=(*(Hit(row.id, excerpt(row.reason)) for row in lost[:NUM_SHOWN]), *found.shown)[:NUM_SHOWN],
        )

    def mends(self, options: str, places: Iterable[int]) -> tuple[Mend, ...]:
        """These options of `data fix` for each file that holds some of the training rows."""
        starts = [source.start for source in self.sources]
        paths = [self.sources[bisect_right(starts, place) - 1].path for place in places] if starts else []
        return tuple(Mend(path, options) for path in dict.fromkeys(paths))


def share(count: int, total: int) -> str:
    """`14 of 999 (1.4 %)`."""
    percent = 100 * count / total if total else 0.0
    digits = 0 if count in (0, total) or percent >= 10 else 1
    small = 0 < percent < 0.1
    return f"{count:,} of {total:,} ({'under 0.1' if small else f'{percent:.{digits}f}'} %)"


def plural(count: int, one: str, many: str = "") -> str:
    """`1 row`, `2 rows`."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def by_share(count: int, total: int, *, warning: float, blocker: float = 2.0) -> Severity:
    """note below the share `warning`, blocker from the share `blocker` on (2: never)."""
    part = count / total if total else 0.0
    level: Literal["blocker", "warning", "note"] = "warning" if part >= warning else "note"
    return "blocker" if part >= blocker else level


def excerpt(text: str) -> str:
    """A short piece of a row for a table: private parts masked, control characters gone, one line."""
    masked = mask(text[:MAX_MASKED])
    plain = "".join(" " if unicodedata.category(character) in ("Cc", "Cf", "Cs") else character for character in masked)
    line = " ".join(plain.split())
    return line if len(line) <= MAX_EXCERPT else f"{line[: MAX_EXCERPT - 1]}…"
