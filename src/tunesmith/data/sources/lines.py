"""Lines of a .jsonl file, not yet decoded.

In: the file. Out: chunks of lines with their numbers. Must not know: what a line holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import IO

from tunesmith.data.sources import streams
from tunesmith.data.sources.chunks import JsonChunk
from tunesmith.data.sources.groups import grouped
from tunesmith.errors import DataError

Line = tuple[int, bytes]


def read_lines(path: Path, name: str, num_rows: int, limit: int | None) -> Iterator[JsonChunk]:
    """Chunks of lines; blank ones are skipped. Only \\n ends a line: U+2028 and other breaks are content."""
    with streams.open_bytes(path, name) as stream:
        for group in grouped(_rows(stream, name), _size, num_rows=num_rows, limit=limit):
            numbers, lines = zip(*group, strict=True)
            yield JsonChunk(name, numbers, lines)


def numbered_lines(stream: IO[bytes], name: str, *, max_bytes: int) -> Iterator[Line]:
    """Every line with its number, from 1. Raises DataError at a line longer than `max_bytes`."""
    number = 0
    while line := stream.readline(max_bytes + 1):
        number += 1
        if len(line) > max_bytes:
            raise streams.too_long(f"{name}:{number}", "line", max_bytes)
        yield number, line


def _rows(stream: IO[bytes], name: str) -> Iterator[Line]:
    first = True
    for number, line in numbered_lines(stream, name, max_bytes=streams.MAX_LINE_BYTES):
        if line.isspace():
            continue
        if first and line.lstrip().startswith(b"["):
            raise DataError(
                "the file is a JSON array, not one object a line",
                where=f"{name}:{number}",
                remedy="Name it .json, not .jsonl.",
            )
        first = False
        yield number, line.rstrip(b"\r\n")


def _size(line: Line) -> int:
    return len(line[1])
