from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support.models import tiny_model
from tests.support.training import pair_trees, sft_stage
from tunesmith.pipeline import resumed
from tunesmith.pipeline.resumed import THREADS, engine_as_before, settle_threads, stage_as_before
from tunesmith.runs.folder import RunFolder, StageFolder, create_or_open
from tunesmith.train.checkpoint import State, save_checkpoint

STATE = State(
    step=2,
    num_steps=4,
    best_step=None,
    best_loss=None,
    reference_mean=None,
    threads=1,
    torch_version="2",
    identity={},
    asked_tokens=512,
    forest_tokens=512,
    checkpointing="full",
    attention="sdpa",
)


def saved(folder: StageFolder, **changes: object) -> StageFolder:
    state = replace(STATE, **changes)  # type: ignore[arg-type]
    save_checkpoint(folder.create().checkpoints, state=state, weights={"a": torch.ones(1)}, optimizer={})
    return folder


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return create_or_open(tmp_path, "run")


@pytest.fixture
def cores(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A machine of so many cores; the recipe leaves the threads open, so all of them are in use."""

    def have(number: int) -> None:
        monkeypatch.setattr(resumed, "num_cores", lambda: number)
        torch.set_num_threads(number)

    return have


def settled(run: RunFolder, stage: str = "sft", *, asked: int = 0) -> tuple[int, list[str]]:
    said: list[str] = []
    settle_threads(run, stage, asked=asked, tell=said.append)
    return torch.get_num_threads(), said


def test_a_new_run_keeps_its_threads(run: RunFolder, cores: Callable[[int], None]) -> None:
    cores(2)
    assert settled(run) == (2, [])
    assert run.read_manifest()[THREADS] == 2


def test_more_cores_than_before_are_left_idle(run: RunFolder, cores: Callable[[int], None]) -> None:
    cores(1)
    settled(run)
    cores(2)
    threads, said = settled(run, "the stage after it")  # it has no checkpoint yet
    assert threads == 1
    assert len(said) == 1
    assert "goes on with 1 threads, as it began; this machine has 2 cores" in said[0]


def test_the_checkpoint_s_threads_come_before_the_run_s(run: RunFolder, cores: Callable[[int], None]) -> None:
    saved(run.stage("sft"), threads=1)
    cores(2)
    assert settled(run)[0] == 1
    cores(2)
    assert settled(run, "dpo") == (2, [])


def test_fewer_cores_are_told(run: RunFolder, cores: Callable[[int], None]) -> None:
    saved(run.stage("sft"), threads=64)
    cores(2)
    threads, said = settled(run)
    assert threads == 2
    assert "it began on 64 threads, and this machine has 2 cores: rounding can differ" in said[0]


def test_what_the_recipe_asks_for_stays(run: RunFolder, cores: Callable[[int], None]) -> None:
    saved(run.stage("sft"), threads=1)
    cores(2)
    assert settled(run, asked=2) == (2, [])


def engine_backend(folder: StageFolder, attention: str = "auto") -> tuple[str, list[str]]:
    said: list[str] = []
    engine, _ = engine_as_before(
        tiny_model("llama"),
        pair_trees(3),
        attention=attention,  # type: ignore[arg-type]
        autocast=None,
        folder=folder,
        tell=said.append,
    )
    return engine.backend, said


def test_the_kernel_of_the_checkpoint_is_taken(run: RunFolder) -> None:
    assert engine_backend(run.stage("sft")) == ("sdpa", [])
    assert engine_backend(saved(run.stage("sft"), attention="plain")) == ("plain", [])
    assert engine_backend(run.stage("sft"), "sdpa") == ("sdpa", [])  # the recipe names it


def test_a_kernel_that_is_not_here_is_told(run: RunFolder) -> None:
    backend, said = engine_backend(saved(run.stage("sft"), attention="varlen"))
    assert backend == "sdpa"
    assert "computed with attention varlen, and here it cannot be: " in said[0]


def test_checkpoints_of_before_name_no_kernel(run: RunFolder) -> None:
    assert engine_backend(saved(run.stage("sft"), attention=None)) == ("sdpa", [])


@pytest.mark.parametrize("plan", [None, "{", "[]"])
def test_a_lost_plan_of_memory_is_the_checkpoint_s(run: RunFolder, plan: str | None) -> None:
    folder = saved(run.stage("sft"))
    if plan is not None:
        (folder.path / "memory.json").write_text(plan)
    stage = stage_as_before(sft_stage(forest_tokens=None), folder)
    assert (stage.forest_tokens, stage.gradient_checkpointing) == (512, "full")
    stage = stage_as_before(sft_stage(forest_tokens=90), folder)
    assert (stage.forest_tokens, stage.gradient_checkpointing) == (90, "full")


def test_a_plan_that_is_there_stays(run: RunFolder) -> None:
    folder = saved(run.stage("sft"))
    (folder.path / "memory.json").write_text(json.dumps({"forest_tokens": 100}))
    stage = sft_stage(forest_tokens=None)
    assert stage_as_before(stage, folder) is stage
    assert stage_as_before(stage, run.stage("new")) is stage
