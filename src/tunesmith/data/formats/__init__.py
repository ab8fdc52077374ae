"""Rows to examples. Nothing behind this package knows Alpaca from ShareGPT.

In: rows and their source. Out: the plan (the format with its reason), and for every row an example or why it gave none.
Must not know: tokenizers, templates, stages.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from tunesmith.data.formats import (
    alpaca,
    labeled,
    messages,
    preference,
    preferred_output,
    prompt_completion,
    question_answer,
    ranked,
    sharegpt,
    text,
    toolalpaca,
    transcripts,
)
from tunesmith.data.formats.detect import PAIRS, RAW_BY_DEFAULT, Detected, detect, kind_of, mixed_error
from tunesmith.data.formats.feedback import Feedback, feedback_of
from tunesmith.data.formats.fields import SYSTEMS, BadField, Degenerate, shown
from tunesmith.data.types import BadRow, Example, Json, Row
from tunesmith.errors import DataError
from tunesmith.recipe.models import FormatName, Source

__all__ = [
    "FORMATS",
    "MAX_SHOWN",
    "Decoded",
    "DegenerateRow",
    "Feedback",
    "FormatPlan",
    "decode_row",
    "feedback_of",
    "kind_of",
    "mixed_error",
    "plan_format",
    "to_examples",
    "unread_columns",
]

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


def _format(decode: Decode, *keys: str | Iterable[str]) -> Format:
    names = [name for key in keys for name in ([key] if isinstance(key, str) else key)]
    return Format(decode, frozenset(names))


TOOLS = ("tools", "functions", "parallel_tool_calls")
WEIGHT = "weight"
"""How much a pair counts; `tunesmith.data.shape` reads it where a stage wants it, and says so where none does."""
_ALPACA = _format(alpaca.to_example, "history", alpaca.INPUTS, *alpaca.SPELLINGS, SYSTEMS, TOOLS)
_QUESTION = _format(question_answer.to_example, *question_answer.SPELLINGS, "context", SYSTEMS, TOOLS)
_MESSAGES = _format(messages.to_example, "messages", toolalpaca.KEYS, SYSTEMS, TOOLS)
_SHAREGPT = _format(sharegpt.to_example, sharegpt.NAMES, SYSTEMS, TOOLS)
_COMPLETION = _format(prompt_completion.to_example, "prompt", "completion", SYSTEMS, TOOLS)
_SINGLE = (_ALPACA, _QUESTION, _MESSAGES, _SHAREGPT, _COMPLETION)
FORMATS: dict[FormatName, Format] = {
    "messages": _MESSAGES,
    "sharegpt": _SHAREGPT,
    "alpaca": _ALPACA,
    "question_answer": _QUESTION,
    "prompt_completion": _COMPLETION,
    "text": _format(text.to_example, "text"),
    "preference": _format(preference.to_example, preference.KEYS, WEIGHT, SYSTEMS, TOOLS),
    "transcripts": _format(transcripts.to_example, "chosen", "rejected", WEIGHT),
    "preferred_output": _format(preferred_output.to_example, preferred_output.KEYS, WEIGHT, TOOLS),
    "ranked": _format(ranked.to_example, ranked.KEYS, WEIGHT, SYSTEMS, TOOLS),
    "labeled": _format(labeled.to_example, labeled.LABELS, *(one.keys for one in _SINGLE)),
}
EXTRAS = frozenset({"value", "accepted", "kind", "tags"})
NUM_ANSWERS: dict[FormatName, int] = {"ranked": 0, **dict.fromkeys(PAIRS, 2)}
"""Answers a row, where they are not one; 0: as many as the row has."""
# Columns whose meaning would be lost in silence if they were merely not read.
UNSUPPORTED = (
    *("tools", "functions", "label", "kto_tag", "history", "weight", "weights"),
    *("image", "images", "video", "videos", "audio", "audios"),
)
EMPTY: tuple[Json, ...] = (None, "", [], {}, "[]")


@dataclass(frozen=True, slots=True)
class FormatPlan:
    """How to read every row of a source. `num_answers`: 1, 2, or 0 where each row has its own number.

    `keys` are the columns that are read. `chat` says whether strings become turns.
    """

    format: FormatName
    reason: str
    chat: bool
    num_answers: int
    keys: frozenset[str]


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
        lines = [f"  {bad.id}: {bad.field}: found {bad.found}; wanted {bad.wanted}" for bad in self.bad[:MAX_SHOWN]]
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


def plan_format(rows: Sequence[Row], source: Source) -> FormatPlan:
    """The format of a source, named in the recipe or detected from its first rows.

    Raises DataError for an unknown format, for rows in several, and for columns that are not supported yet.
    """
    named = Detected(source.format, "named in the recipe") if source.format != "auto" else None
    detected = named or detect(rows, source.path)
    name = detected.format
    keys = FORMATS[name].keys | EXTRAS
    _refuse_unsupported(rows, keys, source.path)
    chat = source.render == "chat" or (source.render == "auto" and _chat_by_default(name, rows))
    return FormatPlan(name, detected.reason, chat, NUM_ANSWERS.get(name, 1), keys)


def decode_row(row: Row, plan: FormatPlan) -> Example | BadRow | DegenerateRow:
    """One row's example, or what is wrong with it, or why it teaches nothing."""
    for key in UNSUPPORTED:
        if key in row.fields and _is_lost(row, key, plan.keys):
            found = shown(row.fields[key])
            return BadRow(row.id, key, found, "no such column (it is not supported yet)", row.sha)
    try:
        return FORMATS[plan.format].decode(row, chat=plan.chat)
    except BadField as error:
        return BadRow(row.id, error.field, error.found, error.wanted, row.sha)
    except Degenerate as error:
        return DegenerateRow(row, str(error))


def to_examples(rows: Sequence[Row], source: Source) -> Decoded:
    """Rows to examples in the source's format, detected where the recipe says auto.

    Malformed rows are collected in `bad`, degenerate ones in `dropped`: nothing is lost.
    Raises DataError for an unknown or mixed file, and for columns that are not supported yet.
    """
    plan = plan_format(rows, source)
    examples: list[Example] = []
    bad: list[BadRow] = []
    dropped: list[DegenerateRow] = []
    for row in rows:
        match decode_row(row, plan):
            case Example() as example:
                examples.append(example)
            case BadRow() as malformed:
                bad.append(malformed)
            case DegenerateRow() as degenerate:
                dropped.append(degenerate)
    unread = unread_columns((key for row in rows for key in row.fields), plan.format)
    return Decoded(examples, plan.format, plan.reason, plan.num_answers, bad, dropped, unread)


def unread_columns(keys: Iterable[str], name: FormatName) -> list[str]:
    """The columns that a format does not read, sorted."""
    return sorted(set(keys) - FORMATS[name].keys - EXTRAS)


def _chat_by_default(name: FormatName, rows: Sequence[Row]) -> bool:
    """Raw text for plain text and for prompt and completion strings; chat for everything else."""
    if name not in RAW_BY_DEFAULT:
        return True
    return name == "prompt_completion" and any(prompt_completion.has_messages(row.fields) for row in rows)


def _refuse_unsupported(rows: Sequence[Row], read: frozenset[str], where: str) -> None:
    counts = Counter(key for row in rows for key in UNSUPPORTED if _is_lost(row, key, read))
    for key, count in counts.items():
        raise DataError(
            f"{count} of {len(rows)} rows have a `{key}` column, which is not supported yet",
            where=where,
            remedy=f"Leave it out, or say that it may be ignored: `columns: {{unused_{key}: {key}}}`.",
        )


def _is_lost(row: Row, key: str, read: frozenset[str]) -> bool:
    return key not in read and row.fields.get(key) not in EMPTY
