"""Files to rows.

In: a source of the recipe (.jsonl, .json, .jsonl.gz, .parquet; a path or `embedded:...`). Out: rows with
their place in the file and a content hash, or a DataError that names the file and the line.
Must not know: what the columns mean, tokenizers.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import IO, NoReturn, cast

import pyarrow as pa
import pyarrow.parquet as pq

from tunesmith.data.types import Json, Row
from tunesmith.errors import DataError
from tunesmith.recipe.models import Source
from tunesmith.recipe.resources import embedded

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet")
MAX_LINE_BYTES = 64 * 2**20  # a longer line is a damaged file or an attack, not a training row
MAX_DEPTH = 64  # no known format nests deeper than 8; Python's own parser gives up near 1,000
BOM = b"\xef\xbb\xbf"


def read_rows(source: Source) -> list[Row]:
    """Every row of the file (the first `limit`), with the recipe's renames applied.

    Raises DataError: no such file, a folder, an unknown suffix, an empty file, and whatever is wrong
    inside it, with `file:line`.
    """
    path = resolve(source.path)
    pairs = islice(_read(path, source.path), source.limit)
    rows = [_row(where, value, source.columns) for where, value in pairs]
    if not rows:
        raise DataError("the file holds no rows", where=source.path, remedy="Give a file with at least one row.")
    _check_renames(rows, source)
    return rows


def resolve(path: str) -> Path:
    """The file that a recipe's path names. Raises DataError where there is none."""
    file = embedded(path) or Path(path)
    if file.is_dir():
        raise DataError("this is a folder, not a file", where=path, remedy=f"Name one file in it: {_supported()}.")
    if not file.exists():
        raise DataError(
            "no such file", where=path, remedy=f"Paths are relative to the working directory, {Path.cwd()}."
        )
    return file


def content_sha(value: Json) -> str:
    """sha256 of the value as canonical JSON: keys sorted, no spaces, UTF-8."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _supported() -> str:
    return ", ".join(SUFFIXES)


def _read(path: Path, name: str) -> Iterator[tuple[str, Json]]:
    lower = path.name.lower()
    try:
        if lower.endswith(".jsonl.gz"):
            with gzip.open(path, "rb") as stream:
                yield from _lines(cast(IO[bytes], stream), name)
        elif lower.endswith(".jsonl"):
            with path.open("rb") as stream:
                yield from _lines(stream, name)
        elif lower.endswith(".json"):
            yield from _array(path.read_bytes(), name)
        elif lower.endswith(".parquet"):
            yield from _table(path, name)
        else:
            raise DataError("unsupported kind of file", where=name, remedy=f"Supported: {_supported()}.")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"the gzip stream is damaged or cut off ({error})", where=name, remedy="Copy or download the file again."
        ) from error
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", where=name) from error


def _lines(stream: IO[bytes], name: str) -> Iterator[tuple[str, Json]]:
    """One JSON object a line. Only \\n ends a line: U+2028 and other Unicode breaks are content."""
    number = 0
    while line := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        where = f"{name}:{number}"
        if len(line) > MAX_LINE_BYTES:
            raise DataError(f"the line is longer than {MAX_LINE_BYTES // 2**20} MiB", where=where)
        if number == 1:
            line = line.removeprefix(BOM)
        if not line.strip():
            continue
        value = _parse(line.rstrip(b"\r\n"), where)
        if number == 1 and isinstance(value, list):
            raise DataError(
                "the file is a JSON array, not one object a line", where=where, remedy="Name it .json, not .jsonl."
            )
        yield where, value


def _array(data: bytes, name: str) -> Iterator[tuple[str, Json]]:
    data = data.removeprefix(BOM)
    if not data.strip():
        return
    values = _parse(data, name)
    if isinstance(values, dict):
        keys = ", ".join(list(values)[:10])
        raise DataError(
            f"the file holds one JSON object (keys: {keys}), not an array of rows",
            where=name,
            remedy="Save the rows themselves as an array, [{...}, {...}], or as .jsonl, one object a line.",
        )
    if not isinstance(values, list):
        raise DataError(f"the file holds {_kind(values)}, not an array of rows", where=name)
    for index, value in enumerate(values):
        yield f"{name}[{index}]", value


def _table(path: Path, name: str) -> Iterator[tuple[str, Json]]:
    """Rows of a table. NaN, the null of pandas, becomes null; other non-JSON values are refused by name."""
    try:
        index = 0
        for batch in pq.ParquetFile(path).iter_batches(batch_size=1024):
            for values in batch.to_pylist():
                where = f"{name}[{index}]"
                yield where, {key: _json_value(value, where, key) for key, value in values.items()}
                index += 1
    except pa.ArrowException as error:
        raise DataError(f"not a readable Parquet file: {error}", where=name) from error


def _json_value(value: object, where: str, column: str) -> Json:
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return None if math.isnan(value) else value
    if isinstance(value, list):
        return [_json_value(item, where, column) for item in value]
    if isinstance(value, dict):
        return {str(key): _json_value(item, where, column) for key, item in value.items()}
    raise DataError(
        f"column `{column}` holds {type(value).__name__}, which has no JSON form",
        where=where,
        remedy="Convert the column to strings or numbers, or leave it out of the file.",
    )


def _parse(data: bytes, where: str) -> Json:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = f"{where}:{data.count(10, 0, error.start) + 1}" if not _has_place(where) else where
        raise DataError(
            f"not UTF-8: byte 0x{data[error.start]:02x} at byte {_byte_in_line(data, error.start)} of the line",
            where=line,
            remedy="Convert the file to UTF-8; bytes are never replaced silently.",
        ) from error
    try:
        value: Json = json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise _not_json(error, text, where) from error
    except RecursionError as error:
        raise _too_deep(where) from error
    except ValueError as error:  # a constant that JSON does not have, or an integer of thousands of digits
        raise DataError(f"not JSON: {error}", where=where) from error
    if text.count("[") + text.count("{") > MAX_DEPTH and _depth_over(value, MAX_DEPTH):
        raise _too_deep(where)
    return value


def _has_place(where: str) -> bool:
    """Whether the name already ends in a line number (`.jsonl`), as against a whole file (`.json`)."""
    return where.rpartition(":")[2].isdigit()


def _byte_in_line(data: bytes, offset: int) -> int:
    return offset - (data.rfind(b"\n", 0, offset) + 1) + 1


def _not_json(error: json.JSONDecodeError, text: str, where: str) -> DataError:
    place = where if _has_place(where) else f"{where}:{error.lineno}"
    remedy = "Each line must be one JSON object."
    if not _has_place(where):
        many = error.msg == "Extra data" and text.lstrip().startswith("{")
        remedy = "This looks like one object a line: name it .jsonl." if many else "The file must be one JSON array."
    elif error.pos >= len(text.rstrip()):
        remedy = "The line is cut off. Copy the file again, or delete the line."
    return DataError(f"not JSON at column {error.colno}: {error.msg}", where=place, remedy=remedy)


def _too_deep(where: str) -> DataError:
    return DataError(f"nested deeper than {MAX_DEPTH} levels", where=where)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


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


def _row(where: str, value: Json, columns: dict[str, str]) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"the row is {_kind(value)}, not an object with named fields", where=where)
    fields = _rename(value, columns, where)
    try:
        return Row(id=where, fields=fields, sha=content_sha(fields))
    except UnicodeEncodeError as error:
        raise DataError(
            f"half of a surrogate pair (\\u{ord(error.object[error.start]):04x}), which is not a character",
            where=where,
            remedy="Mend or delete the row: the text was cut inside an emoji or another wide character.",
        ) from error


def _rename(fields: dict[str, Json], columns: dict[str, str], where: str) -> dict[str, Json]:
    """Columns under their wanted names; the file's own names of renamed columns disappear."""
    kept = {key: value for key, value in fields.items() if key not in columns.values()}
    for wanted, found in columns.items():
        if found not in fields:
            continue
        if wanted in kept:
            raise DataError(
                f"`columns` renames `{found}` to `{wanted}`, but the row has `{wanted}` already",
                where=where,
                remedy=f"Rename `{wanted}` as well, for example {{{wanted}_unused: {wanted}}}.",
            )
        kept[wanted] = fields[found]
    return kept


def _check_renames(rows: list[Row], source: Source) -> None:
    for wanted, found in source.columns.items():
        if not any(wanted in row.fields for row in rows):
            keys = ", ".join(sorted({key for row in rows for key in row.fields})[:20])
            raise DataError(
                f"`columns` reads `{found}` as `{wanted}`, but no row has `{found}`",
                where=source.path,
                remedy=f"Keys found: {keys}.",
            )


def _kind(value: Json) -> str:
    if value is None:
        return "null"
    names = {bool: "a bool", int: "a number", float: "a number", str: "a string", list: "an array", dict: "an object"}
    return names[type(value)]
