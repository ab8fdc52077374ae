from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tunesmith.data.plan import plan_forests
from tunesmith.data.store import Joined, StoreWriter, TreeStore, digest_of, pack, sizes_of, take
from tunesmith.data.types import Branch, Tree


def random_trees(count: int, seed: int = 0) -> list[Tree]:
    """Trees of one to three branches; some have no prompt."""
    rng = np.random.default_rng(seed)

    def one(number: int) -> Tree:
        lengths = rng.integers(1, 9, int(rng.integers(1, 4)))
        branches = (
            Branch(rng.integers(0, 99, n).astype(np.int32), rng.integers(0, 2, n).astype(np.bool_)) for n in lengths
        )
        return Tree(f"dätei:{number}", rng.integers(0, 99, int(rng.integers(0, 6))).astype(np.int32), tuple(branches))

    return [one(number) for number in range(count)]


def write_store(folder: Path, trees: list[Tree]) -> TreeStore:
    writer = StoreWriter(folder)
    writer.append(pack(trees))
    writer.close()
    return TreeStore(folder)


def test_a_store_gives_back_what_was_written(tmp_path: Path) -> None:
    trees = random_trees(50)
    chosen = np.random.default_rng(1).integers(0, 2, 20).astype(np.bool_)
    writer = StoreWriter(tmp_path / "store")
    writer.append(take(pack(trees[:20]), chosen))
    writer.append(pack([]))
    writer.append(pack(trees[20:]))
    writer.close()
    store = TreeStore(tmp_path / "store")
    wanted = [tree for tree, keep in zip(trees, chosen, strict=False) if keep] + trees[20:]
    assert [(tree.id, tree.sha()) for tree in store] == [(tree.id, tree.sha()) for tree in wanted]
    assert store[-1].id == wanted[-1].id
    assert [tree.id for tree in store[2:5]] == [tree.id for tree in wanted[2:5]]
    assert digest_of(store) == digest_of(wanted)
    with pytest.raises(IndexError):
        store[len(wanted)]


def test_sizes_are_those_of_the_trees(tmp_path: Path) -> None:
    trees = random_trees(40)
    store, plain = sizes_of(write_store(tmp_path / "store", trees)), sizes_of(trees)
    for name in ("num_tokens", "num_trained", "num_unshared", "longest_row", "num_pairs"):
        assert getattr(store, name).tolist() == getattr(plain, name).tolist()
    assert plain.num_tokens.tolist() == [tree.num_tokens for tree in trees]
    assert plan_forests(TreeStore(tmp_path / "store"), 40) == plan_forests(trees, 40)


def test_an_order_chooses_and_arranges(tmp_path: Path) -> None:
    trees = random_trees(5)
    writer = StoreWriter(tmp_path / "store")
    writer.append(pack(trees))
    writer.close(np.array([4, 0, 2]))
    store = TreeStore(tmp_path / "store")
    wanted = [trees[4], trees[0], trees[2]]
    assert [tree.id for tree in store] == [tree.id for tree in wanted]
    assert sizes_of(store).num_tokens.tolist() == [tree.num_tokens for tree in wanted]
    assert digest_of(store) == digest_of(wanted)


def test_joined_sequences_are_one(tmp_path: Path) -> None:
    trees = random_trees(9)
    joined = Joined(trees[:4], [], write_store(tmp_path / "store", trees[4:]))
    assert [tree.id for tree in joined] == [tree.id for tree in trees]
    assert joined[-1].id == trees[-1].id
    assert [tree.id for tree in joined[3:6]] == [tree.id for tree in trees[3:6]]
    assert sizes_of(joined).num_trained.tolist() == sizes_of(trees).num_trained.tolist()
    with pytest.raises(IndexError):
        joined[9]
    assert len(Joined()) == 0


def test_an_empty_store_is_a_store(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", [])
    assert len(store) == 0
    assert len(sizes_of(store).num_tokens) == 0
    assert digest_of(store) == digest_of([])
