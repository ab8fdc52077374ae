"""The text of one JSON object to fields.

In: bytes of one line or of one element of an array. Out: the fields, or a Flaw that says what is wrong there.
Must not know: files, columns.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import NoReturn

from tunesmith.data.types import Json

MAX_DEPTH = 64  # no known format nests deeper than 8; Python's own parser gives up near 1,000
Fields = dict[str, Json]


@dataclass(frozen=True, slots=True)
class Flaw:
    """What is wrong with a row, before it has a name: the words of a BadRow."""

    field: str
    found: str
    wanted: str


class _Refused(ValueError):
    """Text that Python's parser would take and JSON does not."""

    def __init__(self, found: str, wanted: str) -> None:
        super().__init__(found)
        self.found = found
        self.wanted = wanted


def parse_object(data: bytes, *, unit: str = "line") -> Fields | Flaw:
    """The fields of one JSON object; `unit` is what the bytes are called in a flaw: `line` or `row`."""
    try:
        text = data.decode()
        value: Json = _DECODER.decode(text)
    except UnicodeDecodeError as error:
        return Flaw(unit, not_utf8(data, error, unit), "UTF-8; bytes are never replaced silently")
    except json.JSONDecodeError as error:
        return _not_json(error, text, unit)
    except RecursionError:
        return _too_deep(unit)
    except _Refused as error:
        return Flaw(unit, error.found, error.wanted)
    except ValueError:  # Python refuses integers of more than 4,300 digits
        return Flaw(unit, "a number of thousands of digits", "numbers of a sensible size, or a string")
    if not isinstance(value, dict):
        return Flaw(unit, kind(value), "an object with named fields, {...}")
    if text.count("[") + text.count("{") > MAX_DEPTH and _depth_over(value, MAX_DEPTH):
        return _too_deep(unit)
    return value


def kind(value: Json) -> str:
    """What a JSON value is, with its article."""
    if value is None:
        return "null"
    names = {bool: "a bool", int: "a number", float: "a number", str: "a string", list: "an array", dict: "an object"}
    return names[type(value)]


def not_utf8(data: bytes, error: UnicodeDecodeError, unit: str) -> str:
    """The words for the first byte that is not UTF-8; bytes count from 1."""
    return f"not UTF-8: byte 0x{data[error.start]:02x} at byte {error.start + 1} of the {unit}"


def _not_json(error: json.JSONDecodeError, text: str, unit: str) -> Flaw:
    found = f"not JSON at column {error.colno}: {error.msg}"
    if error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string"):
        found += f"; the {unit} is cut off"
    return Flaw(unit, found, f"one whole JSON object a {unit}")


def _too_deep(unit: str) -> Flaw:
    return Flaw(unit, f"nested deeper than {MAX_DEPTH} levels", "a flatter object")


def _refuse_constant(name: str) -> NoReturn:
    raise _Refused(f"not JSON: {name}", "a finite number or null")


def _unique(pairs: list[tuple[str, Json]]) -> Fields:
    """An object's fields. Of two with one name, Python would keep the last in silence."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        name = next(name for name in names if names.count(name) > 1)
        raise _Refused(f"the key {name!r} twice in one object", "every key once")
    return fields


def _depth_over(value: Json, limit: int) -> bool:
    level: list[Json] = [value]
    for _ in range(limit):
        level = [
            item
            for parent in level
            if isinstance(parent, list | dict)
            for item in (parent if isinstance(parent, list) else parent.values())
        ]
    return any(isinstance(item, list | dict) for item in level)


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_unique)
