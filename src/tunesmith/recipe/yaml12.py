"""Reading YAML 1.2 into plain values, with the place of every key and value.

In: bytes or text. Out: `Document(value, keys, values)`: None, bool, int, float, str, list and dict, and for
each key path the line and column where its key and its value stand.
Must not know: what a recipe is.

Only YAML's core schema is read, so `1e-4` is a number, `no` a word and `2026-01-01` a word. What a recipe
never needs is refused rather than built: tags (they can name objects), anchors and aliases (ten lines of
them grow to billions of nodes), duplicate keys, a second document, deep nesting, large files.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    NodeEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)
from ruamel.yaml.reader import ReaderError

from tunesmith.errors import RecipeError

MAX_BYTES = 1 << 20  # the longest recipe that we ship has 3 KiB
MAX_DEPTH = 24  # a recipe is 6 deep; what reads the values after us recurses
MAX_NODES = 20_000  # a pure-Python parser reads as many in a second
Value = None | bool | int | float | str | list["Value"] | dict[str, "Value"]
KeyPath = tuple[str | int, ...]

_NULL = re.compile(r"(null|Null|NULL|~|)\Z")
_BOOL = re.compile(r"(true|True|TRUE|false|False|FALSE)\Z")
_INT = re.compile(r"[-+]?[0-9]+\Z")
_OCTAL = re.compile(r"0o[0-7]+\Z")
_HEX = re.compile(r"0x[0-9a-fA-F]+\Z")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?\Z")
_INFINITE = re.compile(r"[-+]?(\.inf|\.Inf|\.INF)\Z")
_NAN = re.compile(r"(\.nan|\.NaN|\.NAN)\Z")
_MAX_DIGITS = 400  # more cannot be a number that a recipe means, and Python refuses very long ones


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """Line and column, both counted from 1."""

    line: int
    column: int


@dataclass(frozen=True, slots=True)
class Document:
    """What a text said, and where."""

    value: Value
    keys: dict[KeyPath, Place] = field(default_factory=dict)
    values: dict[KeyPath, Place] = field(default_factory=dict)


def scalar(text: str) -> Value:
    """The value of an unquoted scalar in YAML 1.2's core schema. Raises ValueError for a number of absurd length."""
    if _NULL.match(text):
        return None
    if _BOOL.match(text):
        return text[0] in "tT"
    number = _INT.match(text) or _OCTAL.match(text) or _HEX.match(text) or _FLOAT.match(text)
    if number and len(text) > _MAX_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    if _INT.match(text):
        return int(text)
    if _OCTAL.match(text) or _HEX.match(text):
        return int(text, 0)
    if _FLOAT.match(text):
        return float(text)
    if _INFINITE.match(text):
        return float(text.replace(".", ""))
    return float("nan") if _NAN.match(text) else text


def decode(data: bytes, *, where: str) -> str:
    """The text of a file's bytes. Raises RecipeError where it is too large or not UTF-8."""
    if len(data) > MAX_BYTES:
        raise RecipeError(f"{len(data):,} bytes; a recipe has at most {MAX_BYTES:,}", where=where)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise RecipeError(
            f"not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}",
            where=f"{where}:{line}",
            remedy="Save the file as UTF-8.",
        ) from None


def read(text: str, *, where: str) -> Document:
    """Read one document. Raises RecipeError with `where`, line and column for whatever is refused."""
    builder = _Builder(where)
    try:
        for event in YAML(typ="safe", pure=True).parse(text):
            builder.take(event)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{where}:{mark.line + 1}:{mark.column + 1}" if mark else where
        reason = " ".join(part for part in (error.context, error.problem) if part)
        raise RecipeError(f"not YAML: {reason}", where=place) from None
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise RecipeError(
            f"the character U+{ord(text[error.position]):04X} is not allowed", where=f"{where}:{line}"
        ) from None
    except YAMLError as error:
        raise RecipeError(f"not YAML: {error}", where=where) from None
    return builder.document()


@dataclass(slots=True)
class _Open:
    """A list or mapping that is being read; `key` is the mapping's key that waits for its value."""

    path: KeyPath
    items: list[Value] | dict[str, Value]
    key: str | None = None


class _Builder:
    """Turns parser events into values, one at a time, and refuses as early as it can."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._open: list[_Open] = []
        self._documents = 0
        self._nodes = 0
        self._root: Value = None
        self._keys: dict[KeyPath, Place] = {}
        self._values: dict[KeyPath, Place] = {}

    def document(self) -> Document:
        return Document(self._root, self._keys, self._values)

    def take(self, event: Event) -> None:
        if isinstance(event, DocumentStartEvent):
            self._documents += 1
            if self._documents > 1:
                raise self._refuse(event, "a second YAML document starts here", "Keep one recipe in a file.")
        elif isinstance(event, NodeEvent):
            self._node(event)
        elif isinstance(event, MappingEndEvent | SequenceEndEvent):
            self._open.pop()

    def _node(self, event: NodeEvent) -> None:
        self._nodes += 1
        if self._nodes > MAX_NODES:
            raise self._refuse(event, f"more than {MAX_NODES:,} keys and values")
        if isinstance(event, AliasEvent) or event.anchor is not None:
            sign = "*" if isinstance(event, AliasEvent) else "&"
            raise self._refuse(event, f"{sign}{event.anchor}: anchors and aliases are refused", "Write the value out.")
        tag = _tag(event)
        if tag:
            raise self._refuse(event, f"the tag {tag} is refused", "Write plain values; quote a string that needs it.")
        above = self._open[-1] if self._open else None
        if above is not None and isinstance(above.items, dict) and above.key is None:
            self._key(event, above)
        else:
            self._value(event, above)

    def _key(self, event: NodeEvent, above: _Open) -> None:
        if not isinstance(event, ScalarEvent):
            raise self._refuse(event, "a key must be a word, not a list or mapping")
        name = str(event.value)
        path = (*above.path, name)
        if path in self._keys:
            first = self._keys[path]
            raise self._refuse(
                event,
                f"{format_path(path)}: the key stands twice, first in line {first.line}",
                "Remove one of the two.",
            )
        self._keys[path] = _place(event)
        above.key = name

    def _value(self, event: NodeEvent, above: _Open | None) -> None:
        if above is None:
            path: KeyPath = ()
        elif isinstance(above.items, dict):
            assert above.key is not None  # _node saw to it
            path = (*above.path, above.key)
        else:
            path = (*above.path, len(above.items))
        empty = isinstance(event, ScalarEvent) and event.style is None and event.value == ""
        # An empty value's own place is wherever the next thing starts.
        self._values[path] = self._keys.get(path, _place(event)) if empty else _place(event)
        value = self._scalar(event) if isinstance(event, ScalarEvent) else self._collection(event, path)
        if above is None:
            self._root = value
        elif isinstance(above.items, dict):
            assert above.key is not None
            above.items[above.key] = value
            above.key = None
        else:
            above.items.append(value)

    def _scalar(self, event: ScalarEvent) -> Value:
        if event.style is not None:
            return str(event.value)
        try:
            return scalar(event.value)
        except ValueError as error:
            raise self._refuse(event, str(error)) from None

    def _collection(self, event: NodeEvent, path: KeyPath) -> Value:
        if len(self._open) >= MAX_DEPTH:
            raise self._refuse(event, f"nested more than {MAX_DEPTH} deep")
        items: list[Value] | dict[str, Value] = [] if isinstance(event, SequenceStartEvent) else {}
        assert isinstance(event, SequenceStartEvent | MappingStartEvent)
        self._open.append(_Open(path, items))
        return items

    def _refuse(self, event: Event, what: str, remedy: str = "") -> RecipeError:
        place = _place(event)
        return RecipeError(what, where=f"{self._where}:{place.line}:{place.column}", remedy=remedy)


def format_path(path: KeyPath) -> str:
    """`("stages", 1, "beta")` as `stages[1].beta`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _place(event: Event) -> Place:
    mark: Any = event.start_mark  # ruamel leaves it untyped
    return Place(line=mark.line + 1, column=mark.column + 1)


def _tag(event: NodeEvent) -> str:
    if isinstance(event, ScalarEvent | SequenceStartEvent | MappingStartEvent) and event.tag is not None:
        return str(event.tag).replace("tag:yaml.org,2002:", "!!")
    return ""
