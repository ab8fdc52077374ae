"""The ledger: what became of every input row.

In: entries. Out: ledger.parquet, and counts by outcome and reason. Must not know: tokenizers, formats, training.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from tunesmith.runs.atomic import write_bytes

Split = Literal["train", "heldout", "replay"]
Outcome = Literal["kept", "trimmed", "dropped"]


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """One input row: where it came from, what became of it and why; tokens are 0 for dropped rows."""

    id: str
    sha: str
    stage: str
    split: Split
    source: str
    outcome: Outcome
    reason: str
    prompt_tokens: int
    trained_tokens: int


@dataclass(frozen=True, slots=True)
class Count:
    """Rows with one outcome and one kind of reason."""

    split: Split
    outcome: Outcome
    reason: str
    num_rows: int


SCHEMA = pa.schema(
    [(field.name, pa.int64() if field.name.endswith("_tokens") else pa.string()) for field in fields(LedgerEntry)]
)


class Ledger:
    """The entries of a run, one for every row that any stage read."""

    def __init__(self, entries: Iterable[LedgerEntry] = ()) -> None:
        self.entries: list[LedgerEntry] = list(entries)

    def extend(self, entries: Iterable[LedgerEntry]) -> None:
        """Adds a stage's entries."""
        self.entries.extend(entries)

    def summary(self) -> list[Count]:
        """Counts by split, outcome and kind of reason; they add up to the rows read."""
        return summarize(self.entries)

    def write_parquet(self, path: Path) -> None:
        """Writes the whole ledger atomically, rows in the order they were read."""
        rows = [asdict(entry) for entry in self.entries]
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), buffer)
        write_bytes(path, buffer.getvalue())


def read_parquet(path: Path) -> Ledger:
    """The ledger of an earlier run."""
    return Ledger(LedgerEntry(**values) for values in pq.read_table(path, schema=SCHEMA).to_pylist())


def summarize(entries: Sequence[LedgerEntry]) -> list[Count]:
    """Counts by split, outcome and kind of reason (what stands before its first colon), largest first."""
    counts = Counter((entry.split, entry.outcome, entry.reason.partition(":")[0]) for entry in entries)
    ordered = sorted(counts.items(), key=lambda item: (item[0][0], item[0][1], -item[1], item[0][2]))
    return [Count(split, outcome, reason, number) for (split, outcome, reason), number in ordered]
