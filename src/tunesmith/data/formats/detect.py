"""Which format a file is in, decided from its rows and never from its name.

In: rows. Out: the format and the reason in words, or a DataError that lists the keys found and the keys wanted.
Must not know: templates, tokenizers, what the rows are used for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NoReturn

from tunesmith.data.formats import alpaca, labeled, prompts, question_answer, ranked, toolalpaca
from tunesmith.data.formats.fields import Fields, present
from tunesmith.data.formats.transcripts import is_transcript
from tunesmith.data.types import Row
from tunesmith.errors import DataError
from tunesmith.recipe.models import FormatName

Shape = tuple[FormatName, tuple[str, ...]]

# Every way to spell a format by its keys, most telling first: the first whose keys a row has is the row's format.
PAIR_SHAPES: tuple[Shape, ...] = (
    *(("preference", (name, "chosen", "rejected")) for name in (*prompts.STRINGS, *prompts.MESSAGE_LISTS)),
    ("preference", ("question", "response_j", "response_k")),
    ("preferred_output", ("input", "preferred_output", "non_preferred_output")),
)
ANSWER_SHAPES: tuple[Shape, ...] = (
    ("messages", ("messages",)),
    ("sharegpt", ("conversations",)),
    ("sharegpt", ("conversation",)),
    *(("alpaca", keys) for keys in alpaca.SPELLINGS),
    *(("question_answer", keys) for keys in question_answer.SPELLINGS[:1]),
    ("prompt_completion", ("prompt", "completion")),
    ("messages", toolalpaca.KEYS),
    *(("question_answer", keys) for keys in question_answer.SPELLINGS[1:]),
    ("text", ("text",)),
)
SHAPES: tuple[Shape, ...] = (*PAIR_SHAPES, *ANSWER_SHAPES)
PAIRS: frozenset[FormatName] = frozenset({"preference", "transcripts", "preferred_output"})
RAW_BY_DEFAULT: frozenset[FormatName] = frozenset({"text", "prompt_completion"})
MAX_KEYS_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Detected:
    """The decision and its reason."""

    format: FormatName
    reason: str


@dataclass(frozen=True, slots=True)
class _Look:
    """What a row's keys say before its values are looked at."""

    shape: Shape | None
    may_be_pair: bool  # chosen and rejected without a prompt: their values decide
    may_be_ranked: bool  # a prompt and a column of answers: numbers beside them decide


def detect(rows: Sequence[Row], where: str) -> Detected:
    """The one format of all rows. Rows of no known shape are left to the format's own errors, unless all are."""
    kinds = Counter(kind_of(row.fields) for row in rows)
    names = [name for name in kinds if name is not None]
    if len(names) > 1:
        raise mixed_error(kinds, where)
    if not names:
        _refuse_unknown(rows, where)
    (name,) = names
    example = next(row.fields for row in rows if kind_of(row.fields) == name)
    return Detected(name, f"{kinds[name]} of {len(rows)} rows have {_evidence(name, example)}")


def kind_of(fields: Fields) -> FormatName | None:
    """The format that a row's keys (and, where they do not tell, its values) show; None where there is none."""
    look = _look(frozenset([key for key, value in fields.items() if value is not None]))
    if look.may_be_pair and (pair := _pair_without_prompt(fields)) is not None:
        return pair
    if look.may_be_ranked and ranked.shows_ranks(fields):
        return "ranked"
    return look.shape[0] if look.shape is not None else None


def mixed_error(kinds: Counter[FormatName | None], where: str) -> DataError:
    """The refusal of a file whose rows are in several formats, with the count of each."""
    ordered = sorted(kinds.items(), key=lambda item: (item[0] is None, -item[1], str(item[0])))
    counts = ", ".join(f"{count} {name or 'of no known shape'}" for name, count in ordered if count)
    return DataError(
        f"the rows are in several formats: {counts}",
        where=where,
        remedy="Split the file by format, or name one with `format:` and see which rows do not fit.",
    )


def wanted_table() -> str:
    """The keys of every format, one line each; `a/b` means either."""
    lines: dict[str, list[str]] = {}
    spelled: dict[tuple[FormatName, tuple[str, ...]], list[str]] = {}
    for name, needed in PAIR_SHAPES:
        spelled.setdefault((name, needed[1:]), []).append(needed[0])
    for (name, rest), firsts in spelled.items():
        lines.setdefault(name, []).append(" + ".join(["/".join(firsts), *rest]))
    spelled.clear()
    for name, needed in ANSWER_SHAPES:
        spelled.setdefault((name, needed[:-1]), []).append(needed[-1])
    for (name, rest), lasts in spelled.items():
        lines.setdefault(name, []).append(" + ".join([*rest, "/".join(lasts)]))
    lines["transcripts"] = ["chosen + rejected ('\\n\\nHuman: ...\\n\\nAssistant: ...')"]
    lines["preference"].append("chosen + rejected (message lists that share their head)")
    lines["ranked"] = [f"prompt + {'/'.join(ranked.LISTS)} with scores or ranks"]
    lines["labeled"] = ["label + the keys of messages, sharegpt, alpaca, prompt_completion or question_answer"]
    return "\n".join(f"    {name:18}{' | '.join(shapes)}" for name, shapes in lines.items())


@lru_cache(maxsize=4096)  # files have few sets of keys and millions of rows
def _look(keys: frozenset[str]) -> _Look:
    pair = next((shape for shape in PAIR_SHAPES if keys.issuperset(shape[1])), None)
    if pair is not None:
        return _Look(pair, may_be_pair=False, may_be_ranked=False)
    answer = next((shape for shape in ANSWER_SHAPES if keys.issuperset(shape[1])), None)
    if answer is not None and answer[0] != "text":
        label = next((name for name in labeled.LABELS if name in keys), None)
        answer = ("labeled", (*answer[1], label)) if label else answer
    may_be_ranked = bool(keys.intersection(prompts.NAMES) and keys.intersection(ranked.LISTS))
    return _Look(answer, may_be_pair=keys.issuperset(("chosen", "rejected")), may_be_ranked=may_be_ranked)


def _pair_without_prompt(fields: Fields) -> FormatName | None:
    chosen, rejected = fields["chosen"], fields["rejected"]
    if isinstance(chosen, list) and isinstance(rejected, list):
        return "preference"
    strings = isinstance(chosen, str) and isinstance(rejected, str)
    return "transcripts" if strings and is_transcript(str(chosen)) and is_transcript(str(rejected)) else None


def _evidence(name: FormatName, fields: Fields) -> str:
    look = _look(frozenset([key for key, value in fields.items() if value is not None]))
    if look.shape is not None and look.shape[0] == name:
        return _listed(look.shape[1])
    if name == "ranked":
        beside = present(fields, ranked.SCORE_LISTS)
        keys = [present(fields, prompts.NAMES) or "", next(key for key in ranked.LISTS if key in fields)]
        return _listed([*keys, beside]) if beside else f"{_listed(keys)} with scores in them"
    detail = "as 'Human: / Assistant:' transcripts" if name == "transcripts" else "as message lists"
    return f"`chosen` and `rejected` {detail}"


def _listed(keys: Sequence[str]) -> str:
    return " and ".join(f"`{key}`" for key in keys)


def _refuse_unknown(rows: Sequence[Row], where: str) -> NoReturn:
    keys = Counter(key for row in rows for key, value in row.fields.items() if value is not None)
    found = ", ".join(key for key, _ in keys.most_common(MAX_KEYS_SHOWN)) or "none"
    raise DataError(
        f"unknown format: no row has the keys of one\n  keys found: {found}\n  keys wanted:\n{wanted_table()}",
        where=where,
        remedy=_nearest(set(keys)),
    )


def _nearest(keys: set[str]) -> str:
    if {"chosen", "rejected"} <= keys:
        return "`chosen` and `rejected` are strings without a prompt: add a `prompt`, or rename it with `columns`."
    if keys.intersection(ranked.LISTS) and keys.intersection(prompts.NAMES):
        return "A list of answers needs numbers: add a column `scores` (higher is better) or `ranks` (1 is best)."
    found = sorted(SHAPES, key=lambda shape: (-len(keys & set(shape[1])) / len(shape[1]), len(shape[1])))
    name, needed = found[0]
    missing = [key for key in needed if key not in keys]
    if not keys & set(needed):
        return "Rename the file's columns in the recipe, for example `columns: {question: q, answer: a}`."
    return f"Nearest: {name}, which lacks {', '.join(f'`{key}`' for key in missing)}; `columns` renames others to it."
