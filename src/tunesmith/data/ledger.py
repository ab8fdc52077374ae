"""The ledger: what became of every input row.

In: rows' fates, a batch at a time. Out: ledger.parquet, and counts by fate and reason that add up to the rows read.
Must not know: tokenizers, formats, training.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tunesmith.errors import RunFolderError
from tunesmith.runs.atomic import TEMPORARY, fsync_path, private_file
from tunesmith.runs.disk import disk_errors

Split = Literal["train", "heldout", "replay"]
Outcome = Literal["kept", "trimmed", "dropped", "merged"]
FATES: tuple[Outcome, ...] = ("kept", "trimmed", "merged", "dropped")
ROW_GROUP = 1 << 16


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """One input row: where it came from, what became of it and why; tokens are 0 where nothing of it is trained.

    `tokens` are those that a forward pass computes (a shared prompt once), `trained_tokens` those that a loss reads.
    """

    id: str
    sha: str
    stage: str
    split: Split
    source: str
    outcome: Outcome
    reason: str
    tokens: int
    prompt_tokens: int
    trained_tokens: int


@dataclass(frozen=True, slots=True)
class Count:
    """Rows of a stage's side with one fate and one kind of reason."""

    stage: str
    split: Split
    outcome: Outcome
    reason: str
    num_rows: int
    trained_tokens: int


SCHEMA = pa.schema(
    [(field.name, pa.int64() if field.name.endswith("tokens") else pa.string()) for field in fields(LedgerEntry)]
)


class Ledger:
    """The entries of a stage or a run, one for every row that was read: a table, or a file that is read in batches."""

    def __init__(
        self, entries: Iterable[LedgerEntry] = (), *, path: Path | None = None, stage: str | None = None
    ) -> None:
        self._path = path
        self._stage = stage
        self._table = pa.Table.from_pylist([asdict(entry) for entry in entries], schema=SCHEMA)

    def __len__(self) -> int:
        if self._path is None:
            return int(self._table.num_rows)
        with _damage_named(self._path):
            return int(pq.read_metadata(self._path).num_rows)

    def __iter__(self) -> Iterator[LedgerEntry]:
        for table in self.tables():
            for values in table.to_pylist():
                yield LedgerEntry(**values)

    def tables(self) -> Iterator[pa.Table]:
        """The entries in batches of a size that fits in memory, under the stage's name where one is given."""
        if self._path is None:
            yield self._table
            return
        for table in _read_tables(self._path):
            if self._stage is not None:
                column = pa.array([self._stage] * table.num_rows, pa.string())
                table = table.set_column(SCHEMA.get_field_index("stage"), "stage", column)
            yield table

    def summary(self) -> list[Count]:
        """Counts by stage, split, fate and kind of reason (what stands before its first colon), largest first."""
        names = ["stage", "split", "outcome", "reason"]
        counts: dict[tuple[str, Split, Outcome, str], tuple[int, int]] = {}
        for table in self.tables():
            kinds = table.select(["stage", "split", "outcome", "trained_tokens"]).append_column("reason", _kinds(table))
            for row in kinds.group_by(names).aggregate([("trained_tokens", "sum"), ([], "count_all")]).to_pylist():
                key = (row["stage"], row["split"], row["outcome"], row["reason"])
                rows, tokens = counts.get(key, (0, 0))
                counts[key] = (rows + row["count_all"], tokens + row["trained_tokens_sum"])
        found = [Count(*key, rows, tokens) for key, (rows, tokens) in counts.items()]
        stages = list(dict.fromkeys(each.stage for each in found))
        found.sort(key=lambda each: (each.split, each.outcome, -each.num_rows, each.reason))
        return sorted(found, key=lambda each: stages.index(each.stage))


class LedgerWriter:
    """Writes entries as they come, without keeping them."""

    def __init__(self, path: Path) -> None:
        self._writer = pq.ParquetWriter(path, SCHEMA)
        self._pending: list[pa.Table] = []
        self._num_pending = 0
        self.num_rows = 0

    def append(self, columns: Mapping[str, Sequence[object]]) -> None:
        """Adds rows, given as columns of equal length."""
        # Lists, not arrays of NumPy: for those pyarrow imports pandas, which takes most of a second.
        lists = {name: list(columns[name]) for name in SCHEMA.names}
        table = pa.table({name: pa.array(values, SCHEMA.field(name).type) for name, values in lists.items()})
        self._pending.append(table)
        self._num_pending += table.num_rows
        self.num_rows += table.num_rows
        if self._num_pending >= ROW_GROUP:
            self._flush()

    def close(self) -> None:
        """Writes what is left and ends the file."""
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if self._pending:
            self._writer.write_table(pa.concat_tables(self._pending).combine_chunks())
        self._pending, self._num_pending = [], 0


def read_parquet(path: Path) -> Ledger:
    """The ledger of an earlier run or of the cache."""
    return Ledger(path=path)


def _read_tables(path: Path) -> Iterator[pa.Table]:
    """The file's entries, checked against the schema, in batches of a size that fits in memory."""
    with _damage_named(path):
        file = pq.ParquetFile(path)
        if file.schema_arrow.names != SCHEMA.names:
            raise pa.ArrowInvalid("its columns are not those of a ledger")
        for batch in file.iter_batches(ROW_GROUP):
            table = pa.Table.from_batches([batch]).cast(SCHEMA)
            table.validate(full=True)
            yield table


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """A file that is no whole ledger is an error of the run folder."""
    try:
        yield
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:200]
        remedy = "Restore it from a copy, or delete it: `tunesmith run` writes it again."
        raise RunFolderError(f"the ledger cannot be read: {reason}", where=str(path), remedy=remedy) from error


def write_ledgers(path: Path, ledgers: Sequence[Ledger]) -> None:
    """Several ledgers as one file, rows in the order they were read: complete or not at all."""
    temporary = path.with_name(f"{TEMPORARY}{path.name}-{os.getpid()}")
    with disk_errors(path):
        with private_file(temporary) as file, pq.ParquetWriter(file, SCHEMA) as writer:
            for table in (table for ledger in ledgers for table in ledger.tables()):
                writer.write_table(table.cast(SCHEMA))
        fsync_path(temporary)
        temporary.replace(path)
        fsync_path(path.parent)


def drop_rows(path: Path, undrawn: npt.NDArray[np.bool_], *, reason: str) -> None:
    """Rewrites a ledger file with some rows dropped: those at the places where `undrawn` is true."""
    source = pq.ParquetFile(path)
    temporary = path.with_name(f"{TEMPORARY}{path.name}-{os.getpid()}")
    place = 0
    with pq.ParquetWriter(temporary, SCHEMA) as writer:
        for batch in source.iter_batches(ROW_GROUP):
            chosen = pa.array(undrawn[place : place + batch.num_rows])
            place += batch.num_rows
            table = pa.Table.from_batches([batch])
            for name, value in (("outcome", "dropped"), ("reason", reason)):
                column = pc.if_else(chosen, pa.scalar(value), table[name])
                table = table.set_column(SCHEMA.get_field_index(name), name, column)
            for name in ("tokens", "prompt_tokens", "trained_tokens"):
                column = pc.if_else(chosen, pa.scalar(0, pa.int64()), table[name])
                table = table.set_column(SCHEMA.get_field_index(name), name, column)
            writer.write_table(table.cast(SCHEMA))
    temporary.replace(path)


def _kinds(table: pa.Table) -> pa.ChunkedArray:
    return pc.list_element(pc.split_pattern(table["reason"], ":", max_splits=1), 0)


def fates_text(ledgers: Mapping[str, Ledger]) -> str:
    """The table that a run prints: rows read and what became of them, by stage and side. Every line adds up."""
    rows = [["stage", "side", "read", *FATES]]
    for stage, ledger in ledgers.items():
        by_side: dict[Split, Counter[Outcome]] = {}
        for count in ledger.summary():
            by_side.setdefault(count.split, Counter())[count.outcome] += count.num_rows
        for split, fates in sorted(by_side.items(), reverse=True):
            numbers = [sum(fates.values()), *(fates[fate] for fate in FATES)]
            rows.append([stage, split, *(f"{number:,}" for number in numbers)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
