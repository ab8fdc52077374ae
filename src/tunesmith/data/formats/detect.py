"""Which format a file is in, decided from its rows and never from its name.

In: rows. Out: the format and the reason in words, or a DataError that lists the keys found and the keys wanted.
Must not know: templates, tokenizers, what the rows are used for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from tunesmith.data.formats.fields import Fields
from tunesmith.data.formats.transcripts import is_transcript
from tunesmith.data.types import Row
from tunesmith.errors import DataError
from tunesmith.recipe.models import FormatName

# Every way to spell a format, most telling first: the first whose keys a row has is the row's format.
SHAPES: tuple[tuple[FormatName, tuple[str, ...]], ...] = (
    ("preference", ("prompt", "chosen", "rejected")),
    ("preference", ("question", "chosen", "rejected")),
    ("preference", ("instruction", "chosen", "rejected")),
    ("preference", ("conversations", "chosen", "rejected")),
    ("preferred_output", ("input", "preferred_output", "non_preferred_output")),
    ("messages", ("messages",)),
    ("sharegpt", ("conversations",)),
    ("alpaca", ("instruction", "output")),
    ("question_answer", ("question", "answer")),
    ("prompt_completion", ("prompt", "completion")),
    ("question_answer", ("prompt", "answer")),
    ("text", ("text",)),
)
PAIRS: frozenset[FormatName] = frozenset({"preference", "transcripts", "preferred_output"})
RAW_BY_DEFAULT: frozenset[FormatName] = frozenset({"text", "prompt_completion"})


@dataclass(frozen=True, slots=True)
class Detected:
    """The decision and its reason."""

    format: FormatName
    reason: str


def detect(rows: Sequence[Row], where: str) -> Detected:
    """The one format of all rows. Rows of no known shape are left to the format's own errors, unless all are."""
    kinds = Counter(kind_of(row.fields) for row in rows)
    unknown = kinds.pop(None, 0)
    if len(kinds) > 1:
        raise DataError(
            f"the rows are in several formats: {_counts(kinds, unknown)}",
            where=where,
            remedy="Split the file by format, or name one with `format:` and see which rows do not fit.",
        )
    if not kinds:
        _refuse_unknown(rows, where)
    (name, count), *_ = kinds.items()
    assert name is not None
    example = next(row.fields for row in rows if kind_of(row.fields) == name)
    reason = f"{count} of {len(rows)} rows have {_evidence(name, example)}"
    return Detected(name, reason)


def kind_of(fields: Fields) -> FormatName | None:
    """The format that a row's keys (and, for pairs without a prompt, its values) show; None where there is none."""
    keys = {key for key, value in fields.items() if value is not None}
    for name, needed in SHAPES:
        if keys.issuperset(needed):
            return name
    return _pair_without_prompt(fields) if keys.issuperset(("chosen", "rejected")) else None


def wanted_table() -> str:
    """The keys of every format, one line each."""
    lines: dict[str, list[str]] = {}
    for name, needed in SHAPES:
        lines.setdefault(name, []).append(" + ".join(needed))
    lines["transcripts"] = ["chosen + rejected ('\\n\\nHuman: ...\\n\\nAssistant: ...')"]
    lines["preference"].append("chosen + rejected (message lists that share their head)")
    return "\n".join(f"    {name:18}{' | '.join(shapes)}" for name, shapes in lines.items())


def _pair_without_prompt(fields: Fields) -> FormatName | None:
    chosen, rejected = fields["chosen"], fields["rejected"]
    if isinstance(chosen, list) and isinstance(rejected, list):
        return "preference"
    strings = isinstance(chosen, str) and isinstance(rejected, str)
    return "transcripts" if strings and is_transcript(str(chosen)) and is_transcript(str(rejected)) else None


def _evidence(name: FormatName, fields: Fields) -> str:
    keys = next((needed for shape, needed in SHAPES if shape == name and set(needed) <= set(fields)), None)
    if keys is not None:
        return " and ".join(f"`{key}`" for key in keys)
    detail = "as 'Human: / Assistant:' transcripts" if name == "transcripts" else "as message lists"
    return f"`chosen` and `rejected` {detail}"


def _counts(kinds: Counter[FormatName | None], unknown: int) -> str:
    parts = [f"{count} {name}" for name, count in sorted(kinds.items(), key=lambda item: (-item[1], str(item[0])))]
    return ", ".join([*parts, *([f"{unknown} of no known shape"] if unknown else [])])


def _refuse_unknown(rows: Sequence[Row], where: str) -> NoReturn:
    keys = Counter(key for row in rows for key, value in row.fields.items() if value is not None)
    found = ", ".join(key for key, _ in keys.most_common(20)) or "none"
    raise DataError(
        f"unknown format: no row has the keys of one\n  keys found: {found}\n  keys wanted:\n{wanted_table()}",
        where=where,
        remedy=_nearest(set(keys)),
    )


def _nearest(keys: set[str]) -> str:
    if {"chosen", "rejected"} <= keys:
        return "`chosen` and `rejected` are strings without a prompt: add a `prompt`, or rename it with `columns`."
    ranked = sorted(SHAPES, key=lambda shape: (-len(keys & set(shape[1])) / len(shape[1]), len(shape[1])))
    name, needed = ranked[0]
    missing = [key for key in needed if key not in keys]
    if not keys & set(needed):
        return "Rename the file's columns in the recipe, for example `columns: {question: q, answer: a}`."
    return f"Nearest: {name}, which lacks {', '.join(f'`{key}`' for key in missing)}; `columns` renames others to it."
