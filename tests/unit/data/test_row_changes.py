"""Rows before and now: counts by hand, and the first one that differs."""

from __future__ import annotations

import pytest

from tunesmith.data.ledger import Ledger, LedgerEntry
from tunesmith.data.row_changes import row_changes


def ledger(*rows: str, stage: str = "sft", trained: int = 2) -> Ledger:
    """One entry a row, `d.jsonl:N`, its hash the row's text."""
    return Ledger(
        LedgerEntry(f"d.jsonl:{number}", sha, stage, "train", "d.jsonl", "kept", "", 5, 3, trained)
        for number, sha in enumerate(rows, start=1)
    )


@pytest.mark.parametrize(
    ("now", "told"),
    [
        ("a b c d", "4 rows before, 4 now: none of them changed"),
        ("a x c d", "4 rows before, 4 now: 1 changed; the first: d.jsonl:2 changed"),
        ("a b c d e", "4 rows before, 5 now: 1 added; the first: d.jsonl:5 was added"),
        ("a x b c d", "4 rows before, 5 now: 1 added; the first: d.jsonl:2 was added"),  # the others only moved down
        ("a c d", "4 rows before, 3 now: 1 removed; the first: d.jsonl:2 was removed"),
        ("d a b c", "4 rows before, 4 now: 1 reordered; the first: d.jsonl:4 is d.jsonl:1 now"),
        ("", "4 rows before, 0 now: 4 removed; the first: d.jsonl:1 was removed"),
        ("x b d c e f", "4 rows before, 6 now: 2 added, 1 changed, 1 reordered; the first: d.jsonl:1 changed"),
        ("a a b c d", "4 rows before, 5 now: 1 added; the first: d.jsonl:2 was added"),  # a copy is a row of its own
    ],
)
def test_counts_and_first(now: str, told: str) -> None:
    assert str(row_changes(ledger(*"abcd"), ledger(*now.split()), stage="sft")) == told


def test_rows_of_other_stages_do_not_count() -> None:
    found = row_changes(ledger("a", stage="dpo"), ledger("a"), stage="sft")
    assert (found.num_before, found.num_after, found.added) == (0, 1, 1)


def test_equal_text_that_is_trained_in_another_way_is_told() -> None:
    found = row_changes(ledger("a", "b"), ledger("a", "b", trained=1), stage="sft")
    assert (found.otherwise, found.changed) == (2, 0)
    assert "d.jsonl:1: train, kept, 5 tokens, 2 of them trained -> train, kept, 5 tokens, 1 of them" in found.first
