"""Trials and proposals: what happens where memory runs out, what fits instead, what a resumed stage runs with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tunesmith
from tests.support.folders import make_run_inputs, tiny_recipe
from tests.support.models import tiny_model
from tests.unit.pipeline.test_memory import job_of
from tunesmith.data.types import Tree
from tunesmith.engine.engine import Engine
from tunesmith.engine.logprobs import Extra, Logprobs
from tunesmith.engine.trace import moved_away, trace
from tunesmith.errors import ResourceError
from tunesmith.model.machine import Machine
from tunesmith.model.shapes import weight_bytes
from tunesmith.pipeline import memory, memory_stages
from tunesmith.pipeline.memory_predict import Prediction, Setting, StageShapes
from tunesmith.pipeline.memory_stages import disk_bytes
from tunesmith.recipe.models import Recipe


class Small(Engine):
    """Runs out of memory on more than `most` tokens."""

    most = 0
    tried: list[int]

    def logprobs(self, trees: Sequence[Tree], wants: Sequence[Extra] = ()) -> Logprobs:
        tokens = sum(len(tree.prompt_ids) + sum(len(branch.ids) for branch in tree.branches) for tree in trees)
        self.tried.append(tokens)
        if tokens > self.most:
            raise torch.OutOfMemoryError("no room")
        return Engine.logprobs(self, trees)


def small_engine(most: int) -> Small:
    model = tiny_model("llama")
    model.requires_grad_(True)
    engine = Small(model)
    object.__setattr__(engine, "most", most)  # an engine is frozen
    object.__setattr__(engine, "tried", [])
    return engine


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `choose` finds, without tracing."""
    monkeypatch.setattr(memory, "choose", lambda job: (Setting(128, "none"), Prediction({}, {"step": 1})))


@pytest.mark.usefixtures("chosen")
def test_a_trial_that_runs_out_of_memory_is_tried_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "SMALLEST_TRIAL", 16)
    engine, job = small_engine(most=80), job_of(10**12)
    plan = memory._planned(engine, job, Machine.cpu())
    assert max(engine.tried) > 80 >= engine.tried[-1] > 0
    assert plan.forest_tokens == 64  # half of what was tried first
    assert plan.measured_bytes is not None
    assert all(parameter.grad is None for parameter in engine.model.parameters())


@pytest.mark.usefixtures("chosen")
def test_a_trial_that_never_fits_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "SMALLEST_TRIAL", 16)
    with pytest.raises(ResourceError, match="did not fit") as refused:
        memory._planned(small_engine(most=0), job_of(10**12), Machine.cpu())
    assert refused.value.exit_code == 5


def test_a_card_that_is_too_small_is_refused_before_a_trial() -> None:
    engine = small_engine(most=10**6)
    with pytest.raises(ResourceError, match="does not fit"):
        memory._planned(engine, job_of(1), Machine.cpu())
    assert engine.tried == []


def test_other_errors_of_a_trial_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = small_engine(most=0)

    def broken(self: Small, trees: Sequence[Tree], wants: Sequence[Extra]) -> Logprobs:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(Small, "logprobs", broken)
    with pytest.raises(RuntimeError, match="shapes differ"):
        memory.trial(engine, job_of(10**12), Setting(64, "none"), Machine.cpu())


def test_what_is_proposed_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    factors = {"none": 4, "selective": 2, "full": 1}

    def predicted(job: StageShapes, setting: Setting) -> Prediction:
        return Prediction({}, {"step": setting.forest_tokens * factors[setting.gradient_checkpointing]})

    loose = job_of(10**12)
    monkeypatch.setattr(memory_stages, "shapes_for_training", lambda *_, **__: loose.shapes)
    monkeypatch.setattr(memory_stages, "predict", predicted)
    recipe = Recipe.model_validate(tiny_recipe(tmp_path, name="x"))
    tokens = loose.longest_tokens
    asked = job_of(tokens, forest_tokens=1024, gradient_checkpointing="none")
    assert memory_stages.choose(asked) is None
    changes = memory_stages.proposal(recipe, asked)
    assert dict(changes) == {"stages.s.forest_tokens": str(tokens), "stages.s.gradient_checkpointing": "full"}
    allowed = asked.stage.model_copy(update={"forest_tokens": tokens, "gradient_checkpointing": "full"})
    assert memory_stages.choose(replace(asked, stage=allowed)) is not None


def test_what_is_moved_away_is_not_counted() -> None:
    layers = torch.nn.Sequential(*(torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh()) for _ in range(8)))
    rows = torch.zeros(128, 64)

    def run() -> None:
        layers(rows).sum().backward()

    kept = trace(run, layers).peak_bytes
    with moved_away(layers, 2**10):
        away = trace(run, layers).peak_bytes
    assert away < kept - 6 * rows.nbytes  # of eight layers' outputs two are there at once
    with moved_away(layers, 2**20):
        assert trace(run, layers).peak_bytes == kept  # smaller ones stay


def test_disk_counts_the_moments_of_the_optimizer() -> None:
    job = job_of(0)
    weights = weight_bytes(job.shapes.model)
    count = weights.num_trained
    plain = job.stage
    assert disk_bytes(plain, weights) == (plain.keep_checkpoints + 2) * 12 * count + 4 * count
    small = plain.model_copy(update={"optimizer": "adamw_8bit"})
    assert disk_bytes(small, weights) <= disk_bytes(plain, weights)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run_inputs(tmp_path_factory.mktemp("inputs"))


def _recipe(inputs: Path, name: str, **changes: object) -> dict[str, object]:
    recipe = tiny_recipe(inputs, name=name)
    stages = recipe["stages"]
    assert isinstance(stages, list)
    steady = {"schedule": "constant", "warmup_fraction": 0.0, "learning_rate": 1e-2}
    return recipe | {"memory": "8GB", "stages": [stages[0] | steady | changes]}


def test_a_resumed_stage_runs_with_its_plan(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Setting(64, "none"), Prediction({}, {"step": 1})  # tracing takes seconds; the trial is a real one
    monkeypatch.setattr(memory, "choose", lambda job: found)
    tunesmith.run(_recipe(inputs, "grown", max_steps=1))
    kept = json.loads((inputs / "runs/grown/stages/sft/memory.json").read_text())
    assert kept["measured_bytes"] > 0
    whole = tunesmith.run(_recipe(inputs, "whole", max_steps=2))

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("planned anew")

    monkeypatch.setattr(memory, "_planned", refused)
    grown = tunesmith.run(_recipe(inputs, "grown", max_steps=2))
    assert json.loads((grown / "stages/sft/memory.json").read_text()) == kept
    adapter = "stages/sft/adapter/adapter_model.safetensors"
    assert (grown / adapter).read_bytes() == (whole / adapter).read_bytes()
