from __future__ import annotations

from pathlib import Path

from tunesmith.data.ledger import Count, Ledger, LedgerEntry, Outcome, read_parquet


def entry(number: int, outcome: Outcome = "kept", reason: str = "") -> LedgerEntry:
    return LedgerEntry(f"f:{number}", "sha", "sft", "train", "f", outcome, reason, prompt_tokens=3, trained_tokens=2)


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
        Count("train", "dropped", "longer than max_length", 2),
        Count("train", "dropped", "empty answer", 1),
        Count("train", "kept", "", 2),
    ]
    assert sum(count.num_rows for count in summary) == len(ENTRIES)


def test_parquet_round_trip(tmp_path: Path) -> None:
    ledger = Ledger(ENTRIES[:2])
    ledger.extend(ENTRIES[2:])
    ledger.write_parquet(tmp_path / "ledger.parquet")
    assert read_parquet(tmp_path / "ledger.parquet").entries == ENTRIES
    Ledger().write_parquet(tmp_path / "ledger.parquet")
    assert read_parquet(tmp_path / "ledger.parquet").entries == []
    assert [path.name for path in tmp_path.iterdir()] == ["ledger.parquet"]
