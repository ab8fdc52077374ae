"""Elements of a .json array, cut from each other without holding the array in memory.

In: the file. Out: chunks of the elements' bytes with their indices. Must not know: what an element holds.

The scanner reads the bytes as Latin-1: JSON's own signs are ASCII, so an element ends at the same byte however its
text is encoded, and the encoding is judged later, row by row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple, NoReturn

from tunesmith.data.sources import streams
from tunesmith.data.sources.chunks import JsonChunk
from tunesmith.data.sources.groups import grouped
from tunesmith.data.sources.parse import MAX_DEPTH, kind
from tunesmith.data.types import Json
from tunesmith.errors import DataError

_SPACE = re.compile(r"[ \t\r\n]*")
_LONGEST_WORD = 16  # characters of the longest literal or escape that the end of the window may cut in two


class Element(NamedTuple):
    """One element's bytes; `number` is its index, `line` where it begins."""

    number: int
    text: bytes
    line: int


def read_array(path: Path, name: str, num_rows: int, limit: int | None) -> Iterator[JsonChunk]:
    """Chunks of elements. Raises DataError, with line and column, where the array itself is not JSON."""
    with streams.open_bytes(path, name) as stream:
        for group in grouped(_elements(_Window(stream, name)), _size, num_rows=num_rows, limit=limit):
            indices, texts, lines = zip(*group, strict=True)
            yield JsonChunk(name, indices, texts, lines)


def _size(element: Element) -> int:
    return len(element.text)


def _skip(_number: str) -> None:
    """Numbers are not read here; this also accepts those that the row's parser will refuse."""


_SCANNER = json.JSONDecoder(strict=False, parse_float=_skip, parse_int=_skip, parse_constant=_skip)


class _Window:
    """A stretch of the file as Latin-1 text, from `pos` on; what lies before it is counted and forgotten."""

    def __init__(self, stream: IO[bytes], name: str) -> None:
        self.name = name
        self.text = ""
        self.pos = 0
        self.at_end = False
        self._stream = stream
        self.line = 1  # of `pos`
        self._columns_before = 0  # characters of the window's first line that were forgotten

    def grow(self) -> None:
        """Reads on: a block, or as much again as is held, so that a long element costs two scans and not hundreds."""
        last = self.text.rfind("\n", 0, self.pos)
        self._columns_before = self.pos - last - 1 + (self._columns_before if last < 0 else 0)
        block = self._stream.read(max(streams.BLOCK_BYTES, len(self.text) - self.pos))
        self.at_end = not block
        self.text = self.text[self.pos :] + block.decode("latin-1")
        self.pos = 0

    def move(self, pos: int) -> None:
        """Goes on to a place in the window."""
        self.line += self.text.count("\n", self.pos, pos)
        self.pos = pos

    def peek(self) -> str:
        """The next sign that is not white space; "" at the end of the file."""
        while True:
            match = _SPACE.match(self.text, self.pos)
            assert match is not None  # the pattern matches the empty string
            self.move(match.end())
            if self.pos < len(self.text) or self.at_end:
                return self.text[self.pos : self.pos + 1]
            self.grow()

    def value_end(self) -> int:
        """Where the value at `pos` ends. Raises DataError where it is not JSON, too deep or too long."""
        while True:
            if (end := self._value_end()) is not None:
                return end
            if len(self.text) - self.pos > streams.MAX_LINE_BYTES:
                raise streams.too_long(f"{self.name}:{self.line}", "element", streams.MAX_LINE_BYTES)
            self.grow()

    def _value_end(self) -> int | None:
        """None: the window ends within the value, or might."""
        try:
            _, end = _SCANNER.raw_decode(self.text, self.pos)
        except json.JSONDecodeError as error:
            cut = error.pos + _LONGEST_WORD >= len(self.text) or error.msg.startswith("Unterminated string")
            if cut and not self.at_end:
                return None
            self.refuse(error.msg, error.pos)
        except RecursionError as error:
            raise DataError(f"nested deeper than {MAX_DEPTH} levels", where=f"{self.name}:{self.line}") from error
        return end if end < len(self.text) or self.at_end else None

    def refuse(self, message: str, pos: int) -> NoReturn:
        """Raises DataError at a place in the window, `pos` or behind it."""
        start = self.text.rfind("\n", 0, pos)
        column = pos - start if start >= 0 else self._columns_before + pos + 1
        line = self.line + self.text.count("\n", self.pos, pos)
        remedy = "The file must be one JSON array, [{...}, {...}]."
        if self.at_end and pos >= len(self.text.rstrip()):
            remedy = "The file is cut off. Copy or download it again."
        raise DataError(f"not JSON at column {column}: {message}", where=f"{self.name}:{line}", remedy=remedy)


def _elements(window: _Window) -> Iterator[Element]:
    """Every element of the array; nothing for a blank file."""
    if not (first := window.peek()):
        return
    if first != "[":
        _refuse_value(window)
    window.pos += 1
    index = 0
    while index or window.peek() != "]":
        window.peek()
        end = window.value_end()
        start = window.pos
        if end - start > streams.MAX_LINE_BYTES:
            raise streams.too_long(f"{window.name}[{index}]", "element", streams.MAX_LINE_BYTES)
        yield Element(index, window.text[start:end].encode("latin-1"), window.line)
        window.move(end)
        index += 1
        if window.peek() not in (",", "]"):
            window.refuse("Expecting ',' delimiter", window.pos)
        if window.text[window.pos] == "]":
            break
        window.pos += 1
    window.pos += 1
    if window.peek():
        window.refuse("Extra data", window.pos)


def _refuse_value(window: _Window) -> NoReturn:
    """Raises DataError for a file that holds something else than an array."""
    end = window.value_end()
    head = window.text[window.pos : end].encode("latin-1").decode("utf-8", errors="replace")
    value: Json = json.loads(head, strict=False, parse_int=lambda _: 0)
    window.move(end)
    if not isinstance(value, dict):
        raise DataError(
            f"the file holds {kind(value)}, not an array of rows",
            where=window.name,
            remedy="Save the rows as an array, [{...}, {...}], or as .jsonl, one object a line.",
        )
    if window.peek():
        raise DataError(
            "the file holds one object after another, not an array of rows",
            where=window.name,
            remedy="This looks like one object a line: name it .jsonl.",
        )
    keys = ", ".join(list(value)[:10])
    raise DataError(
        f"the file holds one JSON object (keys: {keys}), not an array of rows",
        where=window.name,
        remedy="Save the rows themselves as an array, [{...}, {...}], or as .jsonl, one object a line.",
    )
