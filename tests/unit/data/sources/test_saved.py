from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.unit.data.build import source
from tunesmith.data.sources import open_source, read_rows
from tunesmith.data.sources.saved import slices
from tunesmith.errors import DataError

datasets = pytest.importorskip("datasets")


def save(folder: Path, **splits: list[str]) -> Path:
    parts = {name: datasets.Dataset.from_dict({"text": texts}) for name, texts in splits.items()}
    datasets.DatasetDict(parts).save_to_disk(str(folder))
    return folder


def texts(path: Path, **knobs: object) -> list[object]:
    return [row.fields["text"] for row in read_rows(source(path, **knobs))]


def refusal(path: Path, **knobs: object) -> str:
    with pytest.raises(DataError) as error:
        read_rows(source(path, **knobs))
    return str(error.value)


def test_splits_and_slices(tmp_path: Path) -> None:
    path = save(tmp_path / "rows", train=list("abcdefghij"), test=["t"])
    assert texts(path) == list("abcdefghij")
    assert texts(path, split="train[:2]+test", limit=3) == ["a", "b", "t"]
    assert texts(path, split="train[80%:]", limit=1) == ["i"]
    assert [row.id for row in read_rows(source(path, split="train[8:]"))] == [f"{path}:train[8]", f"{path}:train[9]"]
    assert "there is no split `dev`\n  Set `split` to one of: train (10 rows), test (1 rows)." in refusal(
        path, split="dev"
    )
    assert "the file holds no rows" in refusal(path, split="train[20:]")


def test_without_a_train_split_one_must_be_named(tmp_path: Path) -> None:
    path = save(tmp_path / "rows", dev=["d"], test=["t"])
    assert "there is no split `train`\n  Set `split` to one of: dev (1 rows), test (1 rows)." in refusal(path)


def test_a_single_data_set_with_rows_chosen(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    datasets.Dataset.from_dict({"text": list("abcdef")}).select([5, 0, 3]).save_to_disk(str(path))
    assert texts(path) == ["f", "a", "d"]
    assert texts(path, split="train[1:]") == ["a", "d"]
    shas = {open_source(source(path, **knobs)).content_sha() for knobs in ({}, {"split": "train[1:]"}, {"limit": 1})}
    assert len(shas) == 3
    path.rename(tmp_path / "moved")
    assert open_source(source(tmp_path / "moved")).content_sha() in shas


def test_a_state_that_names_files_elsewhere_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "rows", train=["a"])
    state = path / "train/state.json"
    state.write_text(state.read_text().replace('"data-00000', '"../../data-00000'))
    assert "state.json names a file outside its folder: '../../data-00000" in refusal(path)
    state.write_text(json.dumps({}))
    assert "state.json is damaged" in refusal(path)


def test_a_damaged_table_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "rows", train=["a"])
    next(path.glob("train/*.arrow")).write_bytes(b"no table")
    assert "the data set cannot be loaded" in refusal(path)


def test_slices_in_numbers() -> None:
    lengths = {"a": 20, "b": 3}
    assert slices("a[10%:-2] + b", lengths, "f") == [("a", 2, 18), ("b", 0, 3)]
    assert slices("a[-25%:]+b[:50%]+b[:9]+a[7:3]", lengths, "f") == [
        *(("a", 15, 20), ("b", 0, 2), ("b", 0, 3)),  # half of 3 is rounded to the even 2
        ("a", 7, 3),
    ]
    for wanted in ("a[", "a[1]", "a[:x]", "", "a++b", "a[:1.5%]", "a[::2]"):
        with pytest.raises(DataError, match="is no split"):
            slices(wanted, lengths, "f")
