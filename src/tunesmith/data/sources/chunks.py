"""Raw chunks: rows that were split from each other and not yet parsed, cheap to send to another process.

In: bytes, cells or tables, as the readers cut them. Out: for each row its id, and its fields or a Flaw.
Must not know: files, the recipe.
"""

from __future__ import annotations

import datetime
import decimal
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import pyarrow as pa

from tunesmith.data.sources.parse import Fields, Flaw, not_utf8, parse_object
from tunesmith.data.types import Json

CHUNK_BYTES = 8 * 2**20  # a chunk ends here even where it has few rows, so that memory stays bounded
Parsed = tuple[str, Fields | Flaw]  # a row's id, and what was read there
_NUL = Flaw("text", "a NUL character, as in a binary or UTF-16 file", "text in UTF-8")


@dataclass(frozen=True, slots=True)
class JsonChunk:
    """JSON objects as bytes: lines of a .jsonl by their line, or elements of a .json array by their index."""

    name: str
    numbers: tuple[int, ...]
    texts: tuple[bytes, ...]
    lines: tuple[int, ...] = ()  # of an array: the line on which each element begins

    @property
    def num_rows(self) -> int:
        """Rows in the chunk, bad ones included."""
        return len(self.texts)

    def parsed(self) -> Iterator[Parsed]:
        """Each row's id, and its fields or what is wrong with it."""
        if not self.lines:
            for number, text in zip(self.numbers, self.texts, strict=True):
                yield f"{self.name}:{number}", parse_object(text)
            return
        for number, text, line in zip(self.numbers, self.texts, self.lines, strict=True):
            value = parse_object(text, unit="row")
            if isinstance(value, Flaw):
                value = Flaw(value.field, f"{value.found} (the row begins on line {line})", value.wanted)
            yield f"{self.name}[{number}]", value


@dataclass(frozen=True, slots=True)
class CellChunk:
    """Records of a .csv or .tsv, by the line on which each begins."""

    name: str
    header: tuple[str, ...]
    records: tuple[tuple[int, list[str] | Flaw], ...]

    @property
    def num_rows(self) -> int:
        """Rows in the chunk, bad ones included."""
        return len(self.records)

    def parsed(self) -> Iterator[Parsed]:
        """Each row's id, and its fields or what is wrong with it; an empty cell is null."""
        for line, cells in self.records:
            yield f"{self.name}:{line}", self._fields(cells)

    def _fields(self, cells: list[str] | Flaw) -> Fields | Flaw:
        if isinstance(cells, Flaw):
            return cells
        if len(cells) != len(self.header):
            names = ", ".join(self.header[:10]) + (", ..." if len(self.header) > 10 else "")
            return Flaw("line", f"{len(cells)} cells", f"{len(self.header)}, as the header has ({names})")
        return {name: cell or None for name, cell in zip(self.header, cells, strict=True)}


@dataclass(frozen=True, slots=True)
class TableChunk:
    """Rows of an Arrow table, by index; `data` is Arrow's own stream of them, free of the buffers around them."""

    name: str
    first: int
    num_rows: int
    data: bytes

    def parsed(self) -> Iterator[Parsed]:
        """Each row's id, and its fields or what is wrong with it."""
        table = pa.ipc.open_stream(self.data).read_all()
        as_they_are = all(_is_plain(column.type) for column in table.schema)
        for index, values in enumerate(_values(table), start=self.first):
            yield f"{self.name}[{index}]", values if as_they_are else _fields(values)


@dataclass(frozen=True, slots=True)
class DocumentChunk:
    """Whole text files, each one row."""

    names: tuple[str, ...]
    texts: tuple[bytes, ...]

    @property
    def num_rows(self) -> int:
        """Rows in the chunk, bad ones included."""
        return len(self.texts)

    def parsed(self) -> Iterator[Parsed]:
        """Each row's id, and its fields or what is wrong with it."""
        for name, data in zip(self.names, self.texts, strict=True):
            yield name, _document(data)


RawChunk = JsonChunk | CellChunk | TableChunk | DocumentChunk


def table_chunk(table: pa.Table, name: str, first: int) -> TableChunk:
    """A chunk of these rows alone: pickling a slice would send the whole table that it was cut from."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return TableChunk(name, first, table.num_rows, sink.getvalue().to_pybytes())


def _document(data: bytes) -> Fields | Flaw:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        start = data.rfind(b"\n", 0, error.start) + 1
        found = f"not UTF-8: byte 0x{data[error.start]:02x} at byte {error.start - start + 1} of line {line}"
        return Flaw("text", found, "UTF-8; bytes are never replaced silently")
    if "\0" in text:
        return _NUL
    return {"text": text} if text.strip() else Flaw("text", "an empty file", "a document")


def text_flaw(line: bytes) -> Flaw | None:
    """What is wrong with a line of a text table, before its cells are split."""
    if b"\0" in line:
        return Flaw("line", f"a NUL character at byte {line.index(0) + 1} of the line", "text in UTF-8")
    try:
        line.decode()
    except UnicodeDecodeError as error:
        return Flaw("line", not_utf8(line, error, "line"), "UTF-8; bytes are never replaced silently")
    return None


def _is_plain(kind: pa.DataType) -> bool:
    """Whether every value of this type is JSON as it stands; floats may be NaN."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _is_plain(kind.value_type)
    if pa.types.is_struct(kind):
        return all(_is_plain(field.type) for field in kind.fields)
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    return bool(text or pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_null(kind))


def _values(table: pa.Table) -> Iterable[Fields | Flaw]:
    """Values as Python has them; of types that are not plain, some may have no JSON form yet."""
    try:
        values: list[Fields] = table.to_pylist(maps_as_pydicts="strict")
    except (UnicodeDecodeError, pa.ArrowException, ValueError, OverflowError, KeyError):
        return [_one_value(table.slice(index, 1)) for index in range(table.num_rows)]
    return values


def _one_value(table: pa.Table) -> Fields | Flaw:
    """A row of a chunk in which some row cannot be read: this one, or the column that is at fault."""
    values: Fields = {}
    for name in table.column_names:
        try:
            (values[name],) = table.column(name).to_pylist(maps_as_pydicts="strict")
        except UnicodeDecodeError as error:
            return Flaw(name, f"bytes that are not UTF-8 ({error.reason})", "text in UTF-8")
        except (pa.ArrowException, ValueError, OverflowError, KeyError) as error:
            return Flaw(name, f"a value that Python cannot hold ({error})", "strings or numbers")
    return values


class _NoJsonForm(Exception):
    def __init__(self, found: str) -> None:
        super().__init__(found)
        self.found = found


def _fields(values: Fields | Flaw) -> Fields | Flaw:
    if isinstance(values, Flaw):
        return values
    fields: Fields = {}
    for column, value in values.items():
        try:
            fields[column] = _json_value(value)
        except _NoJsonForm as error:
            return Flaw(
                column,
                f"{error.found}, which has no JSON form",
                "strings or numbers; convert the column or leave it out of the file",
            )
    return fields


def _json_value(value: object) -> Json:
    """NaN, the null of pandas, becomes null; dates their ISO form, decimals their digits."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return None if math.isnan(value) else value
    if isinstance(value, list):
        return [_json_value(item) for item in value]
    if isinstance(value, dict):
        return {_key(key): _json_value(item) for key, item in value.items()}
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return str(value)
    raise _NoJsonForm(type(value).__name__)


def _key(key: object) -> str:
    if isinstance(key, str):
        return key
    raise _NoJsonForm(f"a map whose keys are {type(key).__name__}")
