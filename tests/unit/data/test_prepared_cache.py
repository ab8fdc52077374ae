"""Prepared rows are found again exactly where nothing that they depend on has changed (TRAPS 33)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.data.build import CHATML, byte_tokenizer, renderer, write_jsonl
from tests.unit.data.test_prepare import qa
from tunesmith.data import cache, prepare, reading
from tunesmith.data.prepare import Prepared, prepare_stage
from tunesmith.data.render import Renderer
from tunesmith.data.template import ChatTemplate
from tunesmith.recipe.models import SftStage


def prepared(path: Path, r: Renderer | None = None, **knobs: object) -> Prepared:
    values = {"name": "one", "method": "sft", "train": [{"path": str(path)}], **knobs}
    return prepare_stage(SftStage.model_validate(values), r or renderer(CHATML), cache_folder=path.parent / "cache")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "a.jsonl", qa(1), qa(2), qa(3))


def test_the_second_start_reads_no_row(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepared(rows)

    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("rows were read again")

    monkeypatch.setattr(reading, "process", fail)
    monkeypatch.setattr(reading, "in_order", fail)
    second = prepared(rows)
    assert second.key == first.key
    assert second.notes == first.notes
    assert [tree.sha() for tree in second.train] == [tree.sha() for tree in first.train]
    assert list(second.ledger) == list(first.ledger)
    other_name = prepared(rows, name="two", epochs=3, learning_rate=1e-5, save_every=7)
    assert other_name.key == first.key
    assert {each.stage for each in other_name.ledger} == {"two"}


def test_one_changed_byte_is_a_miss(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {prepared(rows).key}
    keys.add(prepared(rows, max_length=4095).key)
    keys.add(prepared(rows, heldout_fraction=0.1).key)
    keys.add(prepared(rows, r=renderer(CHATML + " ")).key)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["round"])
    keys.add(prepared(rows, r=Renderer(tokenizer, ChatTemplate("test", CHATML), 4096)).key)
    with monkeypatch.context() as patch:
        patch.setattr(cache, "code_sha", lambda: "other")
        keys.add(prepared(rows).key)
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "version", lambda name: "0")
        keys.add(prepared(rows).key)
    rows.write_bytes(rows.read_bytes().replace(b"question 3", b"question 4"))
    keys.add(prepared(rows).key)
    assert len(keys) == 8


def test_a_run_elsewhere_shares_the_entry(rows: Path) -> None:
    """The run's name and folder are no part of the key: nothing that prepare_stage is given knows them."""
    assert prepared(rows).key == prepared(rows).key
    assert len([path for path in (rows.parent / "cache").iterdir() if not path.name.startswith(".")]) == 1


def test_rows_are_the_same_from_the_cache_and_fresh(rows: Path) -> None:
    first = prepared(rows)
    fresh = prepare_stage(
        SftStage.model_validate({"name": "one", "method": "sft", "train": [{"path": str(rows)}]}),
        renderer(CHATML),
        cache_folder=rows.parent / "elsewhere",
    )
    assert [tree.sha() for tree in fresh.train] == [tree.sha() for tree in first.train]
    assert fresh.sources == first.sources
