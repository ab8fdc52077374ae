from __future__ import annotations

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from tunesmith.data.diff import MAX_SHOWN, DataDiff, diff_ledgers, diff_sources, moved
from tunesmith.errors import DataError
from tunesmith.recipe.models import Source

Fields = dict[str, object]
GROUPS = ("added", "removed", "changed", "moved")


def write(path: Path, rows: list[Fields]) -> Source:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(path=str(path))


def ask(number: int, answer: str = "") -> Fields:
    return {"question": f"What is on page {number}?", "answer": answer or f"{number} geese."}


def compare(folder: Path, old: list[Fields], new: list[Fields]) -> DataDiff:
    return diff_sources(write(folder / "old.jsonl", old), write(folder / "new.jsonl", new))


def counts(diff: DataDiff) -> tuple[int, ...]:
    return tuple(diff.count(name) for name in GROUPS)


def test_added_removed_and_changed_by_prompt(tmp_path: Path) -> None:
    old = [ask(1), ask(2), ask(3), ask(4)]
    new = [ask(9), ask(1), ask(3, "No geese."), ask(4), ask(8)]
    diff = compare(tmp_path, old, new)
    assert counts(diff) == (2, 1, 1, 0)
    changed = next(group for group in diff.groups if group.name == "changed").shown[0]
    assert (changed.before[-2:], changed.after[-2:], changed.note) == (":3", ":3", "differs in answer")
    assert (diff.num_before, diff.num_after, diff.num_same) == (4, 5, 2)
    assert diff.num_after == diff.num_same + diff.count("added") + diff.count("changed")


def test_order_does_not_matter_but_is_told(tmp_path: Path) -> None:
    diff = compare(tmp_path, [ask(1), ask(2), ask(3), ask(4)], [ask(4), ask(1), ask(2), ask(3)])
    assert counts(diff) == (0, 0, 0, 1)
    shown = next(group for group in diff.groups if group.name == "moved").shown[0]
    assert (shown.before[-2:], shown.after[-2:]) == (":4", ":1")


def test_copies_are_counted_one_by_one(tmp_path: Path) -> None:
    assert counts(compare(tmp_path, [ask(1), ask(1)], [ask(1), ask(1), ask(1)])) == (1, 0, 0, 0)


def test_changed_by_its_own_id_and_by_its_place(tmp_path: Path) -> None:
    old = [{"id": 7, **ask(1)}, {"id": 8, **ask(2)}]
    new = [{"id": 8, **ask(2)}, {"id": 7, **ask(100, "x")}, {"id": 9, **ask(3)}]
    assert counts(compare(tmp_path, old, new)) == (1, 0, 1, 0)
    assert counts(compare(tmp_path, [ask(1), ask(2)], [ask(1), ask(3)])) == (0, 0, 1, 0)


def test_equal_files(tmp_path: Path) -> None:
    diff = compare(tmp_path, [ask(1)], [ask(1)])
    assert diff.is_equal
    assert "The rows are the same." in printed(diff)


def test_examples_are_few_and_hold_nothing_private(tmp_path: Path) -> None:
    new = [ask(number, "Mail canary@example.org \x1b[31m [bold]now[/bold]") for number in range(50)]
    diff = compare(tmp_path, [ask(0)], new)
    assert len(diff.groups[0].shown) == MAX_SHOWN
    text = printed(diff) + json.dumps(diff.to_json())
    assert "canary" not in text and "\x1b" not in text and "[bold]" in text
    assert "and 29 more" in text  # 50 rows, of which page 0 is a changed one, 20 shown


@pytest.mark.parametrize(
    ("places", "expected"), [([0, 1, 2], 0), ([2, 0, 1], 1), ([2, 1, 0], 2), ([], 0), ([1, 0, 3, 2], 2)]
)
def test_the_fewest_moves(places: list[int], expected: int) -> None:
    assert len(moved(list(enumerate(places)))) == expected


@settings(max_examples=50, deadline=None)
@given(st.permutations(range(8)))
def test_what_did_not_move_is_in_order(places: list[int]) -> None:
    same = list(enumerate(places))
    kept = [pair for pair in same if pair not in moved(same)]
    assert [two for _, two in kept] == sorted(two for _, two in kept)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=8), st.lists(st.integers(0, 5), min_size=1, max_size=8))
def test_counts_add_up(tmp_path_factory: pytest.TempPathFactory, old: list[int], new: list[int]) -> None:
    diff = compare(tmp_path_factory.mktemp("diff"), [ask(number) for number in old], [ask(number) for number in new])
    assert diff.num_before == diff.num_same + diff.count("removed") + diff.count("changed") == len(old)
    assert diff.num_after == diff.num_same + diff.count("added") + diff.count("changed") == len(new)


def ledger(folder: Path, rows: list[tuple[str, str, str, str, str]]) -> Path:
    names = ("id", "sha", "stage", "split", "outcome")
    folder.mkdir()
    values = [dict(zip(names, row, strict=True)) | {"reason": "", "source": "f"} for row in rows]
    pq.write_table(pa.Table.from_pylist(values), folder / "ledger.parquet")
    return folder


def test_ledgers_tell_splits_and_fates(tmp_path: Path) -> None:
    old = ledger(tmp_path / "a", [
        ("f:1", "s1", "sft", "train", "kept"), ("f:2", "s2", "sft", "train", "kept"),
        ("f:3", "s3", "sft", "train", "kept"), ("f:4", "s4", "sft", "train", "dropped"),
        ("f:1", "s1", "dpo", "train", "kept"),
    ])  # fmt: skip
    new = ledger(tmp_path / "b", [
        ("f:1", "s1", "sft", "heldout", "kept"), ("f:2", "s9", "sft", "train", "kept"),
        ("f:9", "s5", "sft", "train", "kept"), ("f:4", "s4", "sft", "train", "kept"),
        ("f:1", "s1", "dpo", "train", "kept"),
    ])  # fmt: skip
    diff = diff_ledgers(old, new / "ledger.parquet")
    assert {group.name: group.num_rows for group in diff.groups} == {
        "added": 1, "removed": 1, "changed": 1, "on another side": 1, "of another fate": 1
    }  # fmt: skip
    assert "train -> heldout" in printed(diff) and "dropped -> kept" in printed(diff)
    assert diff_ledgers(old, old).is_equal


def test_what_is_no_ledger(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such ledger"):
        diff_ledgers(tmp_path, tmp_path)
    (tmp_path / "ledger.parquet").write_text("no")
    with pytest.raises(DataError, match="not a ledger"):
        diff_ledgers(tmp_path, tmp_path)


def printed(diff: DataDiff) -> str:
    screen = io.StringIO()
    Console(file=screen, width=200).print(diff)
    return screen.getvalue()
