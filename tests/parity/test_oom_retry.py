"""Out of memory in a step: the same tokens in smaller forests, the same update, one line in the log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor

from tests.support.memory import ERRORS, FullMemory, Place
from tests.support.ranks import memory_rank_main
from tests.support.training import (
    MACHINE,
    Trial,
    assert_gradients_equal,
    dpo_stage,
    full_engine,
    gradients_of,
    lora_engine,
    noisy_references,
    pair_trees,
    sft_stage,
    spread_objective,
    weights_of,
)
from tunesmith.data.types import Tree
from tunesmith.engine.engine import Engine
from tunesmith.engine.retry import Budget, MemoryFullError
from tunesmith.errors import ResourceError
from tunesmith.objectives import Objective, dpo
from tunesmith.recipe.models import DpoStage, SftStage
from tunesmith.runs.folder import StageFolder
from tunesmith.runs.records import Value, read_records
from tunesmith.train.checkpoint import OPTIMIZER, STATE, WEIGHTS
from tunesmith.train.loop import train_stage
from tunesmith.train.progress import Silent
from tunesmith.train.retry import FILE
from tunesmith.train.step import Batch, accumulate, score

torch.set_num_threads(1)

# 11 rows, 4 a step: 6 steps, some with one forest of 90 tokens, some with three
STAGES: dict[str, SftStage | DpoStage] = {
    "sft": sft_stage(epochs=2, eval_every=2, save_every=2, learning_rate=1e-3),
    "dpo": dpo_stage(epochs=2, eval_every=2, save_every=2, learning_rate=1e-3),
}


class Notes(Silent):
    """Keeps what is said of memory; may break off after a step, as a power cut would."""

    def __init__(self, crash: int = 0) -> None:
        self.texts: list[str] = []
        self._crash = crash

    def noted(self, text: str) -> None:
        if "memory" in text:
            self.texts.append(text)

    def stepped(self, record: Mapping[str, Value], timing: Mapping[str, Value]) -> None:
        if record["step"] == self._crash:
            raise ConnectionAbortedError


@cache
def undisturbed(name: str) -> tuple[Path, dict[str, Tensor]]:
    trial = Trial(Path(mkdtemp()), STAGES[name], dropout=0.0)
    _, engine = trial.run()
    return trial.folder, weights_of(engine)


def disturbed(folder: Path, name: str, memory: FullMemory) -> tuple[Notes, Engine]:
    trial = Trial(folder, STAGES[name], dropout=0.0)
    engine, notes = Watched(trial.engine().model, memory=memory), Notes()
    trial.run(notes, engine=engine)
    return notes, engine


@dataclass(frozen=True)
class Watched(Engine):
    """An engine whose memory runs out."""

    memory: FullMemory | None = None

    def __post_init__(self) -> None:
        assert self.memory is not None
        self.memory.watch(self.model)


def assert_same_end(folder: Path, engine: Engine, name: str) -> None:
    """Weights to 1e-6, and the records' losses; one record a step."""
    whole, weights = undisturbed(name)
    for key, weight in weights_of(engine).items():
        torch.testing.assert_close(weight, weights[key], atol=1e-6, rtol=0)
    for file in ("metrics.jsonl", "eval.jsonl"):
        found, expected = read_records(folder / file), read_records(whole / file)
        assert [record["step"] for record in found] == [record["step"] for record in expected]
        assert [record["loss"] for record in found] == pytest.approx([record["loss"] for record in expected], rel=1e-5)


@pytest.mark.parametrize("at", [1, 2, 6])  # the first step's first and second forest; one of a later step
@pytest.mark.parametrize("name", STAGES)
def test_a_failed_backward_changes_no_weight(tmp_path: Path, name: str, at: int) -> None:
    memory = FullMemory("backward", at=at)
    notes, engine = disturbed(tmp_path, name, memory)
    assert memory.failures == 1
    assert len(notes.texts) == 1
    assert_same_end(tmp_path, engine, name)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("place", ["forward", "backward"])
def test_every_allocator_is_understood(tmp_path: Path, place: Place, error: str) -> None:
    memory = FullMemory(place, at=2, error=error)
    notes, engine = disturbed(tmp_path, "dpo", memory)
    assert memory.failures == 1
    assert len(notes.texts) == 1
    assert_same_end(tmp_path, engine, "dpo")


def test_another_error_is_no_lack_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ERRORS, "cuda", lambda: RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        disturbed(tmp_path, "sft", FullMemory("backward", at=2))


# before the first step, after the last; the three forests before those of DPO's check are the reference's
@pytest.mark.parametrize(("name", "at", "step"), [("sft", 1, 0), ("sft", 4, 6), ("dpo", 5, 0)])
def test_evaluation_is_done_again(tmp_path: Path, name: str, at: int, step: int) -> None:
    memory = FullMemory("scoring", at=at)
    notes, engine = disturbed(tmp_path, name, memory)
    assert memory.failures == 1
    (note,) = notes.texts
    assert f"in evaluation after step {step} (" in note
    assert_same_end(tmp_path, engine, name)


def test_what_the_log_says_and_what_is_kept(tmp_path: Path) -> None:
    notes, _ = disturbed(tmp_path, "dpo", FullMemory("backward", at=1))
    (line,) = read_records(tmp_path / FILE)
    assert line["step"] == 1
    assert line["phase"] == "train"
    assert line["asked"] == 90
    assert line["tree_tokens"] is None
    assert isinstance(line["forest_tokens"], int)
    assert line["forest_tokens"] < 90
    (note,) = notes.texts
    assert note.startswith("memory ran out in step 1 (CUDA out of memory. Tried to allocate 2.00 GiB.); it is done")
    assert f"micro-batches of {line['forest_tokens']} tokens; the longest row there is tree-" in note


@pytest.mark.parametrize("name", STAGES)
def test_the_budget_stays_lowered(tmp_path: Path, name: str) -> None:
    """No forest may have more than 68 tokens, and one pair has 69, so it goes branch by branch."""
    memory = FullMemory("backward", limit=68)
    notes, engine = disturbed(tmp_path, name, memory)
    lines = read_records(tmp_path / FILE)
    assert memory.failures == len(notes.texts) == len(lines) <= 3
    assert max(memory.sizes) <= 68
    assert_same_end(tmp_path, engine, name)


CASES: dict[str, tuple[Batch, Objective]] = {
    "dpo": (Batch(pair_trees(), noisy_references(pair_trees())), dpo(0.1)),
    "coupled": (Batch(pair_trees()), spread_objective()),
}


@pytest.mark.parametrize("tree_tokens", [1, 40, 68])
@pytest.mark.parametrize("forest_tokens", [1, 60, 10_000])
@pytest.mark.parametrize("name", CASES)
def test_gradients_branch_by_branch(name: str, forest_tokens: int, tree_tokens: int) -> None:
    batch, objective = CASES[name]
    found = []
    for limit in (None, tree_tokens):
        engine = full_engine()
        result = accumulate(
            engine, batch, objective=objective, forest_tokens=forest_tokens, tree_tokens=limit, machine=MACHINE
        )
        found.append((result.loss.mean(), gradients_of(engine)))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-6)
    assert_gradients_equal(found[1][1], found[0][1])


def test_scores_branch_by_branch() -> None:
    engine, batch = full_engine(), CASES["dpo"][0]
    whole_N = score(engine, batch, forest_tokens=100, machine=MACHINE)
    split_N = score(engine, batch, forest_tokens=100, machine=MACHINE, tree_tokens=1)
    torch.testing.assert_close(split_N, whole_N, atol=2e-6, rtol=0)


@pytest.mark.parametrize("place", ["scoring", "backward"])
def test_a_coupled_method_is_done_again(tmp_path: Path, place: Place) -> None:
    """Memory runs out in the scoring pass that fixes the coefficients, or in the backward that uses them."""
    ends = []
    for at in (0, 2):
        engine = Watched(lora_engine(moved=True).model, memory=FullMemory(place, at=at))
        stage = dpo_stage(learning_rate=1e-3)
        train_stage(
            engine=engine,
            stage=stage,
            objective=spread_objective(),
            train=pair_trees(),
            folder=StageFolder(tmp_path / str(at)),
            seed=0,
            machine=MACHINE,
        )
        assert engine.memory is not None
        assert engine.memory.failures == (at > 0)
        ends.append(weights_of(engine))
    for name, weight in ends[0].items():
        torch.testing.assert_close(ends[1][name], weight, atol=1e-6, rtol=0)


def test_failed_work_leaves_no_gradient() -> None:
    engine = Watched(lora_engine(moved=True).model, memory=FullMemory("backward", at=2))
    batch, objective = CASES["dpo"]
    with pytest.raises(MemoryFullError, match="CUDA out of memory"):
        accumulate(engine, batch, objective=objective, forest_tokens=60, machine=MACHINE)
    assert all(parameter.grad is None for parameter in engine.model.parameters())


def test_the_failure_comes_after_gradients_were_left() -> None:
    """What the tests above rely on: when the backward fails, some weights have their gradient already."""
    engine = Watched(lora_engine(moved=True).model, memory=FullMemory("backward", at=1))
    with pytest.raises(torch.OutOfMemoryError):
        engine.logprobs(pair_trees(2)).logprob_N.sum().backward()
    assert any(parameter.grad is not None for parameter in engine.model.parameters())


def test_a_row_that_cannot_fit_is_an_error_with_a_way_out(tmp_path: Path) -> None:
    """Every forest fails; the longest row has a prompt of 60 tokens and an answer of 7."""
    engine = Watched(lora_engine(moved=True).model, memory=FullMemory("backward", limit=0))
    start = weights_of(engine)
    stage = dpo_stage()
    with pytest.raises(ResourceError) as caught:
        train_stage(
            engine=engine,
            stage=stage,
            objective=spread_objective(),
            train=pair_trees(),
            folder=StageFolder(tmp_path),
            seed=0,
            machine=MACHINE,
        )
    assert caught.value.exit_code == 5
    text = str(caught.value)
    assert "stage dpo, step 1: a single answer does not fit in memory (CUDA out of memory." in text
    assert "the longest row, tree-" in text
    assert " GiB" in text
    assert "Set `gradient_checkpointing: full`, or `max_length: " in text
    assert all(weight.equal(start[name]) for name, weight in weights_of(engine).items())
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize("crash", [3, 5])  # goes on from step 2 and from 4: before the failed step, and after it
@pytest.mark.parametrize("place", ["backward", "scoring"])
def test_resumed_after_a_lowering_is_bitwise_the_same(tmp_path: Path, place: Place, crash: int) -> None:
    """Memory runs out once, in step 3 or the evaluation after step 2; the resumed run's memory is large enough."""
    at = {"backward": 5, "scoring": 2}[place]
    trials = [Trial(tmp_path / name, STAGES["sft"], dropout=0.0) for name in ("whole", "broken")]
    trials[0].run(Notes(), engine=Watched(trials[0].engine().model, memory=FullMemory(place, at=at)))
    with pytest.raises(ConnectionAbortedError):
        trials[1].run(Notes(crash), engine=Watched(trials[1].engine().model, memory=FullMemory(place, at=at)))
    trials[1].run()
    for name in (
        "metrics.jsonl",
        "eval.jsonl",
        FILE,
        *(f"checkpoints/step-6/{f}" for f in (WEIGHTS, OPTIMIZER, STATE)),
    ):
        assert (trials[1].folder / name).read_bytes() == (trials[0].folder / name).read_bytes(), name


@pytest.fixture(scope="module")
def rank_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(memory_rank_main, args=(2, folder), nprocs=2)
    return folder


def test_one_rank_without_memory_makes_all_of_them_start_again(rank_folder: Path) -> None:
    """Rank 1 fails in the second step; both lower the budget, and the end is that of an undisturbed run."""
    (line,) = read_records(rank_folder / "failing" / FILE)
    assert line["step"] == 2
    assert not (rank_folder / "whole" / FILE).exists()
    found, expected = (read_records(rank_folder / name / "metrics.jsonl") for name in ("failing", "whole"))
    assert [record["step"] for record in found] == list(range(1, 7))
    for one, other in zip(found, expected, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)


def sizes(trees: Sequence[Tree]) -> list[int]:
    return [tree.num_tokens for tree in trees]


def test_each_lowering_makes_the_largest_forest_smaller() -> None:
    trees = pair_trees()
    budget: Budget | None = Budget(16384)
    largest = []
    while budget is not None:
        forests = budget.plan(trees)
        largest.append(max(sum(unit.tree.num_tokens for unit in forest) for forest in forests))
        assert sum(len(unit.tree.branches) for forest in forests for unit in forest) == 16
        budget = budget.lowered(trees)
    assert largest[0] == sum(sizes(trees))
    assert largest == sorted(set(largest), reverse=True)
    assert largest[-1] == 67  # the row of 60 + 7 tokens, alone
