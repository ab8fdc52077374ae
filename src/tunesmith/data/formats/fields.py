"""What every format shares: typed reading of a row's fields, and the two ways in which a row gives no example.

In: a row's fields. Out: strings, numbers and lists; BadField where a field is malformed (the run stops, or the row
is dropped and counted, as the recipe says), Degenerate where the row is well formed but teaches nothing.
Must not know: files, tokenizers, templates.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import NoReturn

from tunesmith.data.types import Json

Fields = Mapping[str, Json]
SYSTEMS = ("system", "system_prompt")
"""Columns that hold a system message, the usual one first."""
MAX_SHOWN_CHARS = 60  # of a value in an error message: enough to find it in the file


class BadField(Exception):
    """A malformed field: what was found and what is wanted there."""

    def __init__(self, field: str, found: str, wanted: str) -> None:
        super().__init__(f"`{field}`: found {found}; wanted {wanted}")
        self.field = field
        self.found = found
        self.wanted = wanted


class Degenerate(Exception):
    """A well-formed row that teaches nothing; the reason is a ledger reason."""


def shown(value: Json) -> str:
    """A value for an error message, cut to a readable length."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MAX_SHOWN_CHARS else f"{text[: MAX_SHOWN_CHARS - 3]}..."


def found_at(fields: Fields, name: str) -> str:
    """What an error says of a field: its value, or that there is none."""
    return shown(fields[name]) if name in fields else "no such key"


def text_field(fields: Fields, name: str) -> str:
    """A required string. Raises BadField where it is missing or not a string."""
    value = fields.get(name)
    if not isinstance(value, str):
        raise BadField(name, found_at(fields, name), "a string")
    return value


def optional_text(fields: Fields, name: str) -> str:
    """A string, or "" where the key is missing or null."""
    return text_field(fields, name) if fields.get(name) is not None else ""


def system_text(fields: Fields) -> str:
    """The row's system message, or ""."""
    return next((text for name in SYSTEMS if (text := optional_text(fields, name))), "")


def present(fields: Fields, names: Iterable[str]) -> str | None:
    """The first of the names that the row has, null apart."""
    return next((name for name in names if fields.get(name) is not None), None)


def fitting(fields: Fields, spellings: tuple[tuple[str, ...], ...]) -> tuple[str, ...]:
    """The first spelling whose keys the row has, all of them; else the one of which it has most."""
    for names in spellings:
        if all(fields.get(name) is not None for name in names):
            return names
    return max(spellings, key=lambda names: sum(fields.get(name) is not None for name in names) / len(names))


def number(value: Json, field: str) -> float:
    """A finite number, or a string that spells one (tables of text have no other). Raises BadField."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise BadField(field, shown(value), "a number")
    try:
        result = float(value)
    except (ValueError, OverflowError):
        result = math.nan
    if not math.isfinite(result):
        raise BadField(field, shown(value), "a number")
    return result


def parsed(text: str, field: str, wanted: str) -> Json:
    """The value of a string that holds JSON. Raises BadField."""
    try:
        value: Json = json.loads(text, parse_constant=_refuse_constant)
        json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair passes the parser and nothing else
    except (ValueError, RecursionError) as error:
        raise BadField(field, shown(text), wanted) from error
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")
