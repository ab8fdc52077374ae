"""Rows as stages of labels, rankings and weights would train them."""

from __future__ import annotations

from pathlib import Path

from tests.unit.data.build import CHATML, renderer, source, write_jsonl
from tunesmith.data.shape import Shape
from tunesmith.data.show import ShownRow, pick_rows, shown_row
from tunesmith.data.types import Json


def shown(path: Path, shape: Shape, row: dict[str, Json]) -> ShownRow:
    picked = pick_rows(source(write_jsonl(path / "a.jsonl", row)))
    return shown_row(picked.rows[0], picked.plan, renderer(CHATML), shape=shape)


PAIR: dict[str, Json] = {"prompt": "the town?", "chosen": "good", "rejected": "bad", "weight": 0.5}
RANKED: dict[str, Json] = {"prompt": "the town?", "responses": ["one", "two", "three"], "scores": [2, 1, 3]}


def test_a_pair_is_shown_as_two_judged_answers(tmp_path: Path) -> None:
    found = shown(tmp_path, Shape("labels"), PAIR)
    assert [tree.id.rpartition("#")[2] for tree in found.trees] == ["chosen", "rejected"]
    assert [tree.branches[0].label for tree in found.trees] == ["answer, desirable", "answer, undesirable"]
    assert any("two labeled answers" in notice for notice in found.notices)
    assert any("`weight` that is not read" in notice for notice in found.notices)


def test_a_weight_that_is_read_is_shown(tmp_path: Path) -> None:
    assert "weight 0.5" in shown(tmp_path, Shape("pairs", reads_weights=True), PAIR).notices
    wrong = shown(tmp_path, Shape("pairs", reads_weights=True), {**PAIR, "weight": -1})
    assert (wrong.fate, wrong.reason) == ("malformed", "weight: found -1; wanted a number above 0")


def test_a_ranking_is_shown_whole_or_as_its_best_and_worst(tmp_path: Path) -> None:
    labels = [branch.label for branch in shown(tmp_path, Shape("rankings"), RANKED).trees[0].branches]
    assert labels == ["answer 1, score 2", "answer 2, score 1", "answer 3, score 3"]
    found = shown(tmp_path, Shape("pairs"), RANKED)
    assert len(found.trees[0].branches) == 2
    assert any("the best and the worst" in notice for notice in found.notices)
