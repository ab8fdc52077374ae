"""Records of .csv and .tsv files.

In: the file; its first record is the header. Out: chunks of records with the lines on which they begin.
Must not know: what the columns mean.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from tunesmith.data.sources import streams
from tunesmith.data.sources.chunks import CellChunk, text_flaw
from tunesmith.data.sources.groups import grouped
from tunesmith.data.sources.lines import numbered_lines
from tunesmith.data.sources.parse import Flaw
from tunesmith.errors import DataError

MAX_LINE_BYTES = 16 * 2**20  # less than elsewhere: a line of commas takes eight times its size in cells
MAX_CELL_CHARS = 8 * 2**20  # past it, a quote was opened and never closed; Python's own 131,072 cuts off documents
Record = tuple[int, list[str] | Flaw]


def read_commas(path: Path, name: str, num_rows: int, limit: int | None) -> Iterator[CellChunk]:
    """Chunks of a .csv file's records."""
    return _read(path, name, ",", num_rows, limit)


def read_tabs(path: Path, name: str, num_rows: int, limit: int | None) -> Iterator[CellChunk]:
    """Chunks of a .tsv file's records; quotes work as in .csv."""
    return _read(path, name, "\t", num_rows, limit)


def _read(path: Path, name: str, delimiter: str, num_rows: int, limit: int | None) -> Iterator[CellChunk]:
    with streams.open_bytes(path, name) as stream:
        records = _records(stream, name, delimiter)
        first = next(records, None)
        if first is None:
            return
        header = _header(*first, name)
        for group in grouped(records, _size, num_rows=num_rows, limit=limit):
            yield CellChunk(name, header, tuple(group))


class _TextLines:
    """The file's lines as text for the csv module, and what is wrong with them."""

    def __init__(self, stream: IO[bytes], name: str) -> None:
        self._lines = numbered_lines(stream, name, max_bytes=MAX_LINE_BYTES)
        self.number = 0
        self._flaw: Flaw | None = None

    def take_flaw(self) -> Flaw | None:
        """The first flaw of the lines since the last call."""
        flaw, self._flaw = self._flaw, None
        return flaw

    def __iter__(self) -> Iterator[str]:
        for number, line in self._lines:
            self.number = number
            try:
                text = line.decode()
            except UnicodeDecodeError:
                text = line.decode(errors="replace")  # only to find where the record ends: the flaw refuses it
                self._flaw = self._flaw or text_flaw(line)
            if "\0" in text:
                self._flaw = self._flaw or text_flaw(line)
            yield text


def _records(stream: IO[bytes], name: str, delimiter: str) -> Iterator[Record]:
    """Every record that is not blank. Raises DataError where a quote swallows the rest of the file."""
    csv.field_size_limit(MAX_CELL_CHARS)  # the csv module keeps one limit a process
    lines = _TextLines(stream, name)
    reader = csv.reader(iter(lines), delimiter=delimiter, strict=True)
    while True:
        line = lines.number + 1
        try:
            cells: list[str] | Flaw = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            cells = _bad_record(str(error), line, lines.number, name)
        cells = lines.take_flaw() or cells
        if isinstance(cells, Flaw) or len(cells) > 1 or "".join(cells).strip():  # else a blank line
            yield line, cells


def _bad_record(message: str, first: int, last: int, name: str) -> Flaw:
    """One line that is not CSV. Raises DataError where more than one line would go with it."""
    if first == last and "field larger" not in message:
        what = "a quote that is never closed" if "unexpected end" in message else message
        return Flaw(
            "line", f"not CSV: {what}", 'cells with a comma, quote or line break in "..."; a quote within as ""'
        )
    raise DataError(
        f"a quoted cell that is not closed by line {last} or is longer than {MAX_CELL_CHARS // 2**20} Mi characters"
        if "field larger" in message or "unexpected end" in message
        else f"not CSV, up to line {last}: {message}",
        where=f"{name}:{first}",
        remedy='Close the quote; within quotes, a quote is written "".',
    )


def _header(line: int, cells: list[str] | Flaw, name: str) -> tuple[str, ...]:
    where = f"{name}:{line}"
    if isinstance(cells, Flaw):
        raise DataError(f"the header is {cells.found}", where=where, remedy=f"Wanted: {cells.wanted}.")
    if not all(cell.strip() for cell in cells):
        number = next(number for number, cell in enumerate(cells, start=1) if not cell.strip())
        raise DataError(
            f"the header has no name for column {number}",
            where=where,
            remedy="Name every column; of pandas, `to_csv(index=False)` leaves the nameless one out.",
        )
    twice = [cell for cell, count in Counter(cells).items() if count > 1]
    if twice:
        raise DataError(f"the header has the name `{twice[0]}` twice", where=where, remedy="Give each column its own.")
    if len(cells) == 1 and (";" in cells[0] or "\t" in cells[0]):
        raise DataError(
            f"the header is one column, {cells[0]!r}",
            where=where,
            remedy="Cells are separated by commas in .csv and by tabs in .tsv.",
        )
    return tuple(cells)


def _size(record: Record) -> int:
    return 0 if isinstance(record[1], Flaw) else sum(map(len, record[1]))
