from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.unit.data.build import CHATML, renderer, write_jsonl
from tunesmith.data.mismatch import mismatch, partners, with_answer
from tunesmith.data.prepare import prepare_stage
from tunesmith.data.store import StoreWriter, TreeStore, digest_of, pack
from tunesmith.data.types import Branch, Json, Tree
from tunesmith.errors import DataError
from tunesmith.recipe.models import Source
from tunesmith.recipe.preferences import BcoUnpairedStage, KtoStage


def tree(prompt: list[int], answer: list[int], label: bool = True) -> Tree:
    ids = np.array(answer, np.int32)
    return Tree(
        f"row-{prompt}-{answer}", np.array(prompt, np.int32), (Branch(ids, np.ones(len(ids), bool)),), label=label
    )


def found(*trees: Tree, max_length: int = 100) -> list[int]:
    return partners(trees, max_length=max_length)[0].tolist()


def test_the_next_row_with_another_prompt_and_another_answer() -> None:
    assert found(tree([1], [5]), tree([2], [6]), tree([3], [7])) == [1, 2, 0]
    # the second row has the first one's prompt, the third its answer
    assert found(tree([1], [5]), tree([1], [6]), tree([2], [5]), tree([3], [8])) == [3, 2, 3, 0]


def test_a_row_is_never_its_own_partner() -> None:
    """TRAPS 49: an odd number of rows, and repeated ones."""
    trees = [tree([number // 2], [number % 3]) for number in range(7)]
    for place, other in enumerate(found(*trees)):
        assert not np.array_equal(trees[place].prompt_ids, trees[other].prompt_ids)
        assert not np.array_equal(trees[place].branches[0].ids, trees[other].branches[0].ids)


def test_an_answer_that_does_not_fit_is_passed_over() -> None:
    rows = tree([1, 1, 1, 1], [5]), tree([2], [6, 6, 6]), tree([3], [7, 7])
    assert found(*rows, max_length=6) == [2, 2, 0]


def test_where_none_fits_the_shortest_is_cut() -> None:
    rows = tree([1, 1, 1, 1], [5]), tree([2], [6, 6, 6]), tree([3], [7, 7])
    partner_G, is_cut_G = partners(rows, max_length=5)
    assert (partner_G.tolist(), is_cut_G.tolist()) == ([2, 2, 0], [True, False, False])
    both = with_answer(rows[0], rows[2], max_length=5)
    assert [branch.ids.tolist() for branch in both.branches] == [[5], [7]]
    assert both.label is True


def test_rows_far_apart_are_found() -> None:
    """A file sorted by its answers: 200 rows say the same before one says something else."""
    trees = [tree([number], [5]) for number in range(200)] + [tree([999], [6])]
    assert found(*trees) == [200] * 200 + [0]


def test_none_is_refused(tmp_path: Path) -> None:
    for number, trees in enumerate(
        ([tree([1], [5])], [tree([1], [5]), tree([1], [6])], [tree([1], [5]), tree([2], [5])])
    ):
        folder = store(tmp_path / str(number), trees)
        with pytest.raises(DataError, match="no row has another prompt and another answer"):
            mismatch(folder, max_length=100)


def store(folder: Path, trees: list[Tree]) -> Path:
    writer = StoreWriter(folder)
    writer.append(pack(trees))
    writer.close()
    return folder


def test_a_store_is_rewritten_with_figures_and_ids(tmp_path: Path) -> None:
    trees = [tree([number], [50 + number, 9], label=number % 2 == 0) for number in range(300)]
    folder = store(tmp_path / "train", trees)
    assert mismatch(folder, max_length=100) == []
    after = TreeStore(folder)
    assert [each.label for each in after] == [each.label for each in trees]
    assert [each.id for each in after] == [each.id for each in trees]
    assert after[299].branches[1].ids.tolist() == [50, 9]
    assert all(len(each.branches) == 2 for each in after)
    again = store(tmp_path / "again", trees)
    mismatch(again, max_length=100)
    assert digest_of(TreeStore(again)) == digest_of(after)


def judged(number: int) -> dict[str, Json]:
    return {"prompt": f"question {number}", "completion": f"answer {number}", "label": number % 2 == 0}


def test_sides_are_matched_among_themselves(tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "t.jsonl", *map(judged, range(3)))
    held = write_jsonl(tmp_path / "h.jsonl", *map(judged, range(10, 12)))
    sides = {"train": [Source(path=str(train))], "heldout": [Source(path=str(held))]}
    stage = KtoStage.model_validate({"name": "k", **sides})
    prepared = prepare_stage(stage, renderer(CHATML))
    answers = [tree.branches[0].ids.tolist() for tree in prepared.train]
    assert [tree.branches[1].ids.tolist() for tree in prepared.train] == [answers[i] for i in (1, 2, 0)]
    own = [tree.branches[0].ids.tolist() for tree in prepared.heldout]
    assert [tree.branches[1].ids.tolist() for tree in prepared.heldout] == own[::-1]
    assert next(iter(prepared.ledger)).trained_tokens == prepared.heldout[0].branches[0].trained.sum()
    other = BcoUnpairedStage.model_validate({"name": "b", **sides})
    assert [len(tree.branches) for tree in prepare_stage(other, renderer(CHATML)).train] == [1, 1, 1]
