"""The layout of a forest, by hand."""

from __future__ import annotations

import numpy as np

from tunesmith.data.types import Branch, Tree
from tunesmith.engine.forest import TreeSpan, build_forest


def _branch(ids: list[int], trained: list[int]) -> Branch:
    return Branch(np.array(ids, np.int32), np.array(trained, np.bool_))


def test_two_trees_end_to_end() -> None:
    pair = Tree("pair", np.array([10, 11], np.int32), (_branch([20, 21, 22], [1, 0, 1]), _branch([30], [1])))
    text = Tree("text", np.array([], np.int32), (_branch([40, 41, 42], [1, 1, 1]),))
    forest = build_forest([pair, text])
    assert forest.input_ids_T.tolist() == [10, 11, 20, 21, 22, 30, 40, 41, 42]
    assert forest.positions_T.tolist() == [0, 1, 2, 3, 4, 2, 0, 1, 2]  # both branches go on at the prompt's end
    assert forest.spans == (TreeSpan(0, 2, (3, 1)), TreeSpan(6, 0, (3,)))
    assert forest.source_N.tolist() == [1, 3, 1, 6, 7]  # the prompt's last token predicts both branches' first
    assert forest.target_N.tolist() == [20, 22, 30, 41, 42]  # nothing comes before 40, so nothing predicts it
    assert forest.branch_N.tolist() == [0, 0, 1, 2, 2]
    assert forest.tree_B.tolist() == [0, 0, 1]
    assert (forest.num_tokens, forest.num_trained) == (9, 5)
