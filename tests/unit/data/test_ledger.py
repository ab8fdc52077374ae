from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tunesmith.data.ledger import (
    Count,
    Ledger,
    LedgerEntry,
    LedgerWriter,
    Outcome,
    drop_rows,
    fates_text,
    read_parquet,
    write_ledgers,
)
from tunesmith.errors import RunFolderError


def entry(number: int, outcome: Outcome = "kept", reason: str = "") -> LedgerEntry:
    return LedgerEntry(f"f:{number}", "sha", "sft", "train", "f", outcome, reason, 5, prompt_tokens=3, trained_tokens=2)


ENTRIES = [
    entry(1),
    entry(2, "dropped", "longer than max_length: 12 > 10 tokens"),
    entry(3, "dropped", "longer than max_length: 99 > 10 tokens"),
    entry(4, "dropped", "empty answer"),
    entry(5),
]


def test_summary_groups_reasons_and_adds_up() -> None:
    summary = Ledger(ENTRIES).summary()
    assert summary == [
        Count("sft", "train", "dropped", "longer than max_length", 2, 4),
        Count("sft", "train", "dropped", "empty answer", 1, 2),
        Count("sft", "train", "kept", "", 2, 4),
    ]
    assert sum(count.num_rows for count in summary) == len(ENTRIES)


def test_parquet_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "ledger.parquet"
    write_ledgers(path, [Ledger(ENTRIES[:2]), Ledger(), Ledger(ENTRIES[2:])])
    assert list(read_parquet(path)) == ENTRIES
    assert len(read_parquet(path)) == 5
    assert read_parquet(path).summary() == Ledger(ENTRIES).summary()
    assert {each.stage for each in Ledger(path=path, stage="other")} == {"other"}
    write_ledgers(path, [Ledger()])
    assert list(read_parquet(path)) == []
    assert [path.name for path in tmp_path.iterdir()] == ["ledger.parquet"]


def test_rows_that_come_in_batches_are_all_written(tmp_path: Path) -> None:
    path = tmp_path / "ledger.parquet"
    writer = LedgerWriter(path)
    for part in (ENTRIES[:2], ENTRIES[2:]):
        rows = [asdict(each) for each in part]
        writer.append({name: [row[name] for row in rows] for name in rows[0]})
    writer.close()
    assert writer.num_rows == 5
    assert list(read_parquet(path)) == ENTRIES


def test_undrawn_rows_are_dropped_afterwards(tmp_path: Path) -> None:
    path = tmp_path / "ledger.parquet"
    write_ledgers(path, [Ledger(ENTRIES)])
    drop_rows(path, np.array([True, False, False, False, False]), reason="not drawn: why")
    first, *others = read_parquet(path)
    assert (first.outcome, first.reason, first.tokens, first.trained_tokens) == ("dropped", "not drawn: why", 0, 0)
    assert others == ENTRIES[1:]


def test_the_printed_table_adds_up() -> None:
    text = fates_text(
        {"sft": Ledger([*ENTRIES, entry(6, "merged", "repeats an earlier row"), entry(7, "trimmed", "x")])}
    )
    assert text.splitlines() == [
        "stage  side   read  kept  trimmed  merged  dropped",
        "sft    train     7     2        1       1        3",
    ]


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_damaged_ledger_is_named(tmp_path: Path, share: float) -> None:
    path = tmp_path / "ledger.parquet"
    write_ledgers(path, [Ledger([])])
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    for read in (len, list, Ledger.summary):
        with pytest.raises(RunFolderError, match=r"ledger\.parquet: the ledger cannot be read"):
            read(read_parquet(path))


def test_another_table_is_no_ledger(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [1]}), tmp_path / "ledger.parquet")
    with pytest.raises(RunFolderError, match="columns"):
        read_parquet(tmp_path / "ledger.parquet").summary()
