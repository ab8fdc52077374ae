"""A reference pass that was broken off goes on where it stopped, to the same bits (F33, F42, R1)."""

from __future__ import annotations

import hashlib
import os
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load, save

from tests.support.models import tiny_model
from tests.support.trees import random_trees
from tunesmith.data.store import StoreWriter, TreeStore, pack
from tunesmith.data.types import Tree
from tunesmith.engine import reference_parts, retry
from tunesmith.engine.engine import Engine
from tunesmith.engine.logprobs import Logprobs
from tunesmith.engine.reference import reference_logprobs
from tunesmith.engine.reference_parts import Parts, Phase
from tunesmith.engine.retry import Budget
from tunesmith.engine.scoring import Pass, planned
from tunesmith.errors import NumericsError

SHAPES = [(4, (5, 3)), (2, (4, 6)), (7, (1, 2)), (3, (6, 1)), (9, (5, 4)), (2, (2, 2)), (6, (9, 3)), (5, (1, 1))]
TREES = random_trees(tuple(SHAPES), vocabulary=96)
FOREST = 24
Scores = list[np.ndarray]


class Stopped(Exception):
    """What `between` raises here."""


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(tiny_model("llama"))


@pytest.fixture(autouse=True)
def counted(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The forests that were computed, by the ids of their trees."""
    done: list[list[str]] = []
    real = Engine.logprobs

    def spy(self: Engine, trees: list[Tree]) -> Logprobs:
        done.append([tree.id for tree in trees])
        return real(self, trees)

    monkeypatch.setattr(Engine, "logprobs", spy)
    monkeypatch.setattr(retry, "free_memory", lambda: None)  # collecting takes seconds where many tests have run
    return done


def scored(
    engine: Engine,
    folder: Path | None,
    *,
    trees: list[Tree] = TREES,
    tokens: int = FOREST,
    **calls: Callable[..., None],
) -> tuple[Scores, bool]:
    return reference_logprobs(engine, trees, forest_tokens=tokens, fingerprint="a", cache_folder=folder, **calls)


def stop_at(count: int) -> Callable[[], None]:
    calls = iter(range(1000))

    def between() -> None:
        if next(calls) == count:
            raise Stopped

    return between


def equal(one: Scores, two: Scores) -> bool:
    """Bit for bit."""
    return len(one) == len(two) and all(a.tobytes() == b.tobytes() for a, b in zip(one, two, strict=True))


def parts_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.parts/*.safetensors"))


def broken(engine: Engine, folder: Path, count: int = 3) -> None:
    with pytest.raises(Stopped):
        scored(engine, folder, between=stop_at(count))


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part a forest."""
    monkeypatch.setattr(reference_parts, "PART_SECONDS", 0.0)


@pytest.mark.parametrize("at", [0, 1, 3])
def test_a_stopped_pass_goes_on_and_ends_in_the_same_bits(
    engine: Engine, tmp_path: Path, counted: list[list[str]], at: int
) -> None:
    whole, _ = scored(engine, None)
    forests = list(counted)
    assert len(forests) == 5
    counted.clear()
    broken(engine, tmp_path, at)
    assert counted == forests[:at]
    assert len(parts_in(tmp_path)) == (1 if at else 0)
    counted.clear()
    told: list[str] = []
    found, cached = scored(engine, tmp_path, tell=told.append)
    assert equal(found, whole)
    assert not cached
    assert counted[-(5 - at) :] == forests[at:]
    assert len(told) == (1 if at else 0)
    assert not list(tmp_path.glob("*.parts"))  # they go when the whole is published
    assert equal(scored(engine, tmp_path)[0], whole)


def test_again_and_again(engine: Engine, tmp_path: Path, often: None) -> None:
    """One forest a start: none is lost, none is scored twice."""
    whole, _ = scored(engine, None)
    for number in range(1, 4):
        broken(engine, tmp_path, 1)
        assert len(parts_in(tmp_path)) == number
    assert equal(scored(engine, tmp_path)[0], whole)


def test_a_part_is_published_every_thirty_seconds(tmp_path: Path) -> None:
    now = [0.0]
    parts = Parts(tmp_path / "x.parts", "key", clock=lambda: now[0])
    phases = [Phase(Budget(9))]
    files = []
    for second in (0, 20, 29, 31, 59, 60, 61, 200):
        now[0] = second
        parts.add(second, [np.ones(1, np.float32)], phases)
        files.append(len(parts_in(tmp_path)))
    assert files == [0, 0, 0, 1, 1, 1, 2, 3]
    places = sorted(place for part in Parts(tmp_path / "x.parts", "key").read() for place in part.places.tolist())
    assert places == [0, 20, 29, 31, 59, 60, 61, 200]


def _of_little_memory(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    real = Engine.logprobs

    def full(self: Engine, trees: list[Tree]) -> Logprobs:
        if sum(tree.num_tokens for tree in trees) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, trees)

    monkeypatch.setattr(Engine, "logprobs", full)


@pytest.mark.parametrize("most", [60, 20, 15])  # 15: budgets go down twice, and the larger trees answer by answer
def test_where_memory_ran_out_the_next_start_remembers_it(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: list[list[str]], often: None, most: int
) -> None:
    _of_little_memory(monkeypatch, most)
    whole, _ = scored(engine, None, tokens=100)
    forests = list(counted)
    num_forests = len(forests)
    for at in range(1, num_forests):
        folder = tmp_path / str(at)
        with pytest.raises(Stopped):
            scored(engine, folder, tokens=100, between=stop_at(at))
        told: list[str] = []
        counted.clear()
        found, _ = scored(engine, folder, tokens=100, tell=told.append)
        assert equal(found, whole), at
        assert counted[-1] == forests[-1]
    assert not any("memory" in line for line in told)  # the last start did not try again what had not fitted


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "renamed", "folder"])
def test_a_damaged_part_is_scored_again_and_said(
    engine: Engine, tmp_path: Path, counted: list[list[str]], often: None, damage: str
) -> None:
    whole, _ = scored(engine, None)
    broken(engine, tmp_path)
    first, *others = parts_in(tmp_path)
    data = bytearray(first.read_bytes())
    data[-2] ^= 1
    if damage == "renamed":
        first.rename(first.with_name("0" * 64 + ".safetensors"))
    elif damage == "folder":
        first.unlink()
        first.mkdir()
    else:
        first.write_bytes({"flip": bytes(data), "cut": bytes(data[:-9]), "empty": b""}[damage])
    told: list[str] = []
    counted.clear()
    found, _ = scored(engine, tmp_path, tell=told.append)
    assert equal(found, whole)
    assert "1 damaged part" in told[0]
    assert len(others) == 2
    sample = counted[:-2]  # recomputed to see whether the other parts are right
    assert sample
    assert "of 8 rows" in told[1]


def test_a_part_with_other_numbers_is_found_out(engine: Engine, tmp_path: Path) -> None:
    """Whole by its hash, as of a driver that computes wrongly: a sample of it is recomputed."""
    whole, _ = scored(engine, None)
    broken(engine, tmp_path)
    (path,) = parts_in(tmp_path)
    arrays = load(path.read_bytes())
    arrays["values"] = arrays["values"] + np.float32(0.01)
    data = save(arrays)
    path.unlink()
    path.with_name(f"{hashlib.sha256(data).hexdigest()}.safetensors").write_bytes(data)
    told: list[str] = []
    found, _ = scored(engine, tmp_path, tell=told.append)
    assert equal(found, whole)
    assert "does not agree" in told[0]


@pytest.mark.parametrize("other", ["packing", "order", "threads", "rows"])
def test_parts_of_another_pass_are_not_taken(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    broken(engine, tmp_path)
    trees = {"order": TREES[::-1], "rows": TREES[:-1]}.get(other, TREES)
    tokens = 30 if other == "packing" else FOREST
    if other == "threads":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    whole, _ = scored(engine, None, trees=trees, tokens=tokens)
    told: list[str] = []
    found, _ = scored(engine, tmp_path, trees=trees, tokens=tokens, tell=told.append)
    assert equal(found, whole)
    assert not told


def test_two_runs_share_the_cache_and_do_not_disturb_one_another(engine: Engine, tmp_path: Path, often: None) -> None:
    """The other one begins, is faster, publishes and clears away the parts while this one is under way."""
    whole, _ = scored(engine, None)
    other: list[Scores] = []
    calls = iter(range(1000))

    def between() -> None:
        if next(calls) == 2:
            other.append(scored(engine, tmp_path)[0])

    mine, _ = scored(engine, tmp_path, between=between)
    assert equal(mine, whole)
    assert equal(other[0], whole)
    (entry,) = tmp_path.iterdir()
    assert entry.suffix == ".safetensors"


def test_equal_trees_are_scored_once_and_come_back_from_the_cache_as_they_were(
    engine: Engine, tmp_path: Path, counted: list[list[str]]
) -> None:
    """In two forests one tree has two roundings: a run must not train on one and, gone on, on the other."""
    trees = [*TREES, *TREES[::-1], TREES[0]]
    first, _ = scored(engine, tmp_path, trees=trees)
    assert sum(map(len, counted)) == len(TREES)
    second, cached = scored(engine, tmp_path, trees=trees)
    assert cached
    assert equal(first, second)
    assert equal(first[: len(TREES)], scored(engine, None)[0])


def test_a_cache_that_cannot_be_written_costs_a_line(engine: Engine, tmp_path: Path, often: None) -> None:
    (tmp_path / "file").write_text("")
    told: list[str] = []
    found, _ = scored(engine, tmp_path / "file" / "cache", tell=told.append)
    assert equal(found, scored(engine, None)[0])
    assert len(told) == 2
    assert "cannot be kept" in told[0]
    assert "cannot be cached" in told[1]


def test_numbers_that_are_not_finite_leave_no_part(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[int(TREES[1].branches[0].ids[0])] = float("nan")
    with pytest.raises(NumericsError):
        scored(Engine(model), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["cut", "empty", "other", "lengths"])
def test_a_damaged_whole_is_said_and_computed_again(engine: Engine, tmp_path: Path, damage: str) -> None:
    whole, _ = scored(engine, tmp_path)
    (path,) = tmp_path.iterdir()
    data = path.read_bytes()
    if damage == "other":
        reference_logprobs(engine, TREES, forest_tokens=FOREST, fingerprint="b", cache_folder=tmp_path / "b")
        (other,) = (tmp_path / "b").iterdir()
        data = other.read_bytes()
    elif damage == "lengths":  # one tree's numbers moved to its neighbour
        arrays = load(data)
        arrays["lengths"] = arrays["lengths"] + np.array([1, -1] * 4)
        data = save(arrays)
    path.write_bytes({"cut": data[:-7], "empty": b""}.get(damage, data))
    told: list[str] = []
    found, cached = scored(engine, tmp_path, tell=told.append)
    assert not cached
    assert equal(found, whole)
    assert "computed again" in told[0]
    assert scored(engine, tmp_path)[1]


def test_a_file_of_an_earlier_release_is_still_read(engine: Engine, tmp_path: Path) -> None:
    """It does not say its key."""
    scored(engine, tmp_path)
    (path,) = tmp_path.iterdir()
    arrays = load(path.read_bytes())
    del arrays["key"]
    path.write_bytes(save(arrays))
    assert scored(engine, tmp_path)[1]


def test_what_nobody_goes_on_with_is_removed_after_two_weeks(engine: Engine, tmp_path: Path) -> None:
    for name, days in (("old", 15), ("young", 13)):
        (tmp_path / f"{name}.parts").mkdir()
        stamp = time.time() - days * 86400
        os.utime(tmp_path / f"{name}.parts", (stamp, stamp))
    broken(engine, tmp_path)
    assert not (tmp_path / "old.parts").exists()
    assert (tmp_path / "young.parts").exists()


def test_the_plan_goes_on_from_what_was_scored() -> None:
    """Three forests of at most 30 tokens are scored, then memory runs out: the rest is planned under 18."""
    state = Pass(TREES, [Phase(Budget(30))])
    first = list(state.forests)
    assert len(first) > 3
    state.done = {0: [], 1: [], 2: [], 4: []}  # of the last one the file is whole, of the fourth it was damaged
    state.lower(Budget(18))
    assert state.phases == [Phase(Budget(30), 3), Phase(Budget(18))]
    assert state.forests[:3] == first[:3]
    assert sorted(key for forest in state.forests for key in forest) == [(number, None) for number in range(8)]
    assert list(state.done) == [0, 1, 2]
    state.done[3] = []
    state.lower(Budget(18, 10))
    assert [phase.num_forests for phase in state.phases] == [3, 1, None]


def test_planning_reads_no_tree_and_scoring_one_forest_at_a_time(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows may be larger than memory: they lie on disk, and what was read is let go (F24)."""
    writer = StoreWriter(tmp_path / "store")
    writer.append(pack(TREES))
    writer.close()
    store = TreeStore(tmp_path / "store")
    real, alive, most = TreeStore.__getitem__, set[int](), [0]

    def spy(self: TreeStore, index: int) -> Tree:
        tree = real(self, index)
        alive.add(id(tree.prompt_ids))
        weakref.finalize(tree.prompt_ids, alive.discard, id(tree.prompt_ids))
        most[0] = max(most[0], len(alive))
        return tree

    monkeypatch.setattr(TreeStore, "__getitem__", spy)
    forests = planned(store, [Phase(Budget(FOREST))])
    assert most == [0]
    found, _ = scored(engine, tmp_path / "cache", trees=store)  # type: ignore[arg-type]
    assert 0 < most[0] <= max(map(len, forests)) + 1
    assert equal(found, scored(engine, None)[0])
