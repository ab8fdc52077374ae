"""Raw chunks to rows.

In: chunks, the source's renames. Out: rows with their hash, bad rows with what is wrong there.
Must not know: files, what the columns mean.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from tunesmith.data.sources.chunks import RawChunk
from tunesmith.data.sources.hashing import content_sha
from tunesmith.data.sources.opened import open_source
from tunesmith.data.sources.parse import Fields, Flaw
from tunesmith.data.types import BadRow, Json, Row
from tunesmith.errors import DataError
from tunesmith.recipe.models import Source

MAX_SHOWN = 20  # errors printed at once: enough to see a pattern, few enough to read


def read_chunk(raw: RawChunk, source: Source) -> list[Row | BadRow]:
    """A chunk's rows under the source's column names. A row that cannot be read is a BadRow, never an exception."""
    return [_row(where, value, source.columns) for where, value in raw.parsed()]


def iter_rows(source: Source) -> Iterator[Row | BadRow]:
    """Every row of a source in order. Raises DataError where there is none, or a rename finds no column."""
    found: set[str] = set()
    keys: set[str] = set()
    empty = True
    for raw in open_source(source).raw_chunks():
        rows = read_chunk(raw, source)
        found |= _found_renames(rows, source)
        keys |= next((row.fields.keys() for row in rows if isinstance(row, Row)), set())
        empty = empty and not rows
        yield from rows
    if empty:
        raise empty_error(source)
    if keys:  # else every row is bad, which says more
        check_renames(found, source, keys)


def read_rows(source: Source) -> list[Row]:
    """Every row of a source. Raises DataError, with up to 20 of the bad rows, where there is one."""
    rows: list[Row] = []
    bad: list[BadRow] = []
    for row in iter_rows(source):
        if isinstance(row, Row):
            rows.append(row)
        else:
            bad.append(row)
    if bad:
        raise _bad_rows(bad, len(rows) + len(bad), source)
    return rows


def check_renames(found: Collection[str], source: Source, keys: Iterable[str] = ()) -> None:
    """Raises DataError where a rename of the recipe found its column in no row of the source."""
    for wanted, column in source.columns.items():
        if wanted not in found:
            shown = ", ".join(sorted(keys)[:20])
            raise DataError(
                f"`columns` reads `{column}` as `{wanted}`, but no row has `{column}`",
                where=source.path,
                remedy=f"Keys found: {shown}." if shown else "Check the names of the columns.",
            )


def empty_error(source: Source) -> DataError:
    """The refusal of a source without rows."""
    return DataError("the file holds no rows", where=source.path, remedy="Give a file with at least one row.")


def _found_renames(rows: Iterable[Row | BadRow], source: Source) -> frozenset[str]:
    """The wanted names of `columns` that stand in some of these rows."""
    missing = set(source.columns)
    for row in rows:
        if not missing:
            break
        if isinstance(row, Row):
            missing -= row.fields.keys()
    return frozenset(source.columns) - missing


def _bad_rows(bad: list[BadRow], total: int, source: Source) -> DataError:
    lines = [f"  {row.id}: {row.field}: found {row.found}; wanted {row.wanted}" for row in bad[:MAX_SHOWN]]
    more = [f"  ... and {len(bad) - MAX_SHOWN} more"] if len(bad) > MAX_SHOWN else []
    what = "\n".join([f"{len(bad)} of {total} rows cannot be read:", *lines, *more])
    return DataError(what, where=source.path, remedy="Mend or delete these rows.")


def _row(where: str, value: Fields | Flaw, columns: dict[str, str]) -> Row | BadRow:
    fields = _renamed(value, columns) if columns and not isinstance(value, Flaw) else value
    if isinstance(fields, Flaw):
        return BadRow(where, fields.field, fields.found, fields.wanted)
    try:
        return Row(where, fields, content_sha(fields))
    except ValueError as error:  # a surrogate cannot be encoded; 1e999 became infinite
        flaw = _culprit(fields, error)
        return BadRow(where, flaw.field, flaw.found, flaw.wanted)


def _renamed(fields: Fields, columns: dict[str, str]) -> Fields | Flaw:
    """Columns under their wanted names; the file's own names of renamed columns disappear."""
    kept = {key: value for key, value in fields.items() if key not in columns.values()}
    for wanted, column in columns.items():
        if column not in fields:
            continue
        if wanted in kept:
            return Flaw(
                wanted,
                f"`{wanted}` in the row, and `columns` renames `{column}` to `{wanted}`",
                f"one of them; rename the other as well, for example {{{wanted}_unused: {wanted}}}",
            )
        kept[wanted] = fields[column]
    return kept


def _culprit(fields: Fields, error: ValueError) -> Flaw:
    """The field that has no hash, and why."""
    field = next((key for key, value in fields.items() if not _hashes({key: value})), "line")
    if isinstance(error, UnicodeEncodeError):
        found = f"half of a surrogate pair (\\u{ord(error.object[error.start]):04x}), which is not a character"
        return Flaw(_printable(field), found, "whole characters: the text was cut inside an emoji or another wide one")
    return Flaw(_printable(field), "a number that is not finite", "a finite number or null")


def _hashes(value: Json) -> bool:
    try:
        content_sha(value)
    except ValueError:
        return False
    return True


def _printable(name: str) -> str:
    """A column's name with halves of characters escaped, so that the message itself can be printed."""
    return name.encode("utf-8", errors="backslashreplace").decode()
