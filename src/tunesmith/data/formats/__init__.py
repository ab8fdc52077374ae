"""Rows to examples. Nothing behind this package knows Alpaca from ShareGPT.

In: rows and their source. Out: examples, the format with its reason, and every row that gave none.
Must not know: tokenizers, templates, stages.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from tunesmith.data.formats import (
    alpaca,
    messages,
    preference,
    preferred_output,
    prompt_completion,
    question_answer,
    sharegpt,
    text,
    transcripts,
)
from tunesmith.data.formats.detect import PAIRS, RAW_BY_DEFAULT, Detected, detect
from tunesmith.data.formats.fields import BadField, Degenerate
from tunesmith.data.types import Example, Row
from tunesmith.errors import DataError
from tunesmith.recipe.models import FormatName, Source

MAX_SHOWN = 20  # errors printed at once: enough to see a pattern, few enough to read


class Decode(Protocol):
    """One row to one example."""

    def __call__(self, row: Row, *, chat: bool) -> Example:
        """Raises BadField or Degenerate."""
        ...


class Format(NamedTuple):
    """How to read a format, and the keys that are read."""

    decode: Decode
    keys: frozenset[str]


def _format(decode: Decode, *keys: str) -> Format:
    return Format(decode, frozenset(keys))


FORMATS: dict[FormatName, Format] = {
    "messages": _format(messages.to_example, "messages"),
    "sharegpt": _format(sharegpt.to_example, "conversations", "system"),
    "alpaca": _format(alpaca.to_example, "instruction", "input", "output", "system"),
    "question_answer": _format(question_answer.to_example, "question", "prompt", "answer", "system"),
    "prompt_completion": _format(prompt_completion.to_example, "prompt", "completion", "system"),
    "text": _format(text.to_example, "text"),
    "preference": _format(
        preference.to_example,
        *("prompt", "chosen", "rejected", "question", "system", "instruction", "input", "conversations"),
    ),
    "transcripts": _format(transcripts.to_example, "chosen", "rejected"),
    "preferred_output": _format(preferred_output.to_example, "input", "preferred_output", "non_preferred_output"),
}
EXTRAS = frozenset({"value", "accepted", "kind", "tags"})
# Columns whose meaning would be lost in silence if they were merely not read.
UNSUPPORTED = ("tools", "functions", "label", "history", "images", "image", "videos", "audios", "weight", "weights")


@dataclass(frozen=True, slots=True)
class BadRow:
    """A malformed row: which field, what was found there and what is wanted."""

    row: Row
    field: str
    found: str
    wanted: str


@dataclass(frozen=True, slots=True)
class DegenerateRow:
    """A well-formed row that teaches nothing, with the ledger's reason."""

    row: Row
    reason: str


@dataclass(frozen=True, slots=True)
class Decoded:
    """A file's examples, and the rows that gave none."""

    examples: list[Example]
    format: FormatName
    reason: str
    num_answers: int
    bad: list[BadRow]
    dropped: list[DegenerateRow]
    unread: list[str]

    def raise_bad(self, where: str) -> None:
        """Raises DataError with up to 20 malformed rows, one a line, where there are any."""
        if not self.bad:
            return
        lines = [f"  {bad.row.id}: {bad.field}: found {bad.found}; wanted {bad.wanted}" for bad in self.bad[:MAX_SHOWN]]
        more = len(self.bad) - len(lines)
        total = len(self.examples) + len(self.dropped) + len(self.bad)
        raise DataError(
            "\n".join(
                [
                    f"{len(self.bad)} of {total} rows do not fit the format {self.format} ({self.reason}):",
                    *lines,
                    *([f"  ... and {more} more"] if more else []),
                ]
            ),
            where=where,
            remedy="Mend or delete these rows, or name another format with `format:`.",
        )


def to_examples(rows: Sequence[Row], source: Source) -> Decoded:
    """Rows to examples in the source's format, detected where the recipe says auto.

    Malformed rows are collected in `bad`, degenerate ones in `dropped`: nothing is lost.
    Raises DataError for an unknown or mixed file, and for columns that are not supported yet.
    """
    named = Detected(source.format, "named in the recipe") if source.format != "auto" else None
    detected = named or detect(rows, source.path)
    _refuse_unsupported(rows, detected.format, source.path)
    decode, keys = FORMATS[detected.format]
    chat = source.render == "chat" or (source.render == "auto" and _chat_by_default(detected.format, rows))
    examples: list[Example] = []
    bad: list[BadRow] = []
    dropped: list[DegenerateRow] = []
    for row in rows:
        try:
            examples.append(decode(row, chat=chat))
        except BadField as error:
            bad.append(BadRow(row, error.field, error.found, error.wanted))
        except Degenerate as error:
            dropped.append(DegenerateRow(row, str(error)))
    unread = sorted({key for row in rows for key in row.fields} - keys - EXTRAS)
    num_answers = 2 if detected.format in PAIRS else 1
    return Decoded(examples, detected.format, detected.reason, num_answers, bad, dropped, unread)


def _chat_by_default(name: FormatName, rows: Sequence[Row]) -> bool:
    """Raw text for plain text and for prompt and completion strings; chat for everything else."""
    if name not in RAW_BY_DEFAULT:
        return True
    return name == "prompt_completion" and any(isinstance(row.fields.get("prompt"), list) for row in rows)


def _refuse_unsupported(rows: Sequence[Row], name: FormatName, where: str) -> None:
    counts = Counter(key for row in rows for key in UNSUPPORTED if row.fields.get(key) not in (None, "", [], {}, "[]"))
    for key, count in counts.items():
        if key not in FORMATS[name].keys:
            raise DataError(
                f"{count} of {len(rows)} rows have a `{key}` column, which is not supported yet",
                where=where,
                remedy=f"Leave it out, or say that it may be ignored: `columns: {{unused_{key}: {key}}}`.",
            )
