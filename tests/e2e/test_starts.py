"""Wherever a preference stage starts, its reference is exactly that: ln 2 and margin 0 at step 1 (TRAPS 40 to 42)."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

import tunesmith
from tests.support.folders import make_model_folder, make_run_inputs, tiny_recipe
from tunesmith.errors import ModelError, RecipeError


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def earlier(inputs: Path) -> Path:
    """A finished SFT with LoRA, strong enough to move every log-prob, and its merged model."""
    recipe = tiny_recipe(inputs, name="earlier")
    (sft, _) = _stages(recipe)
    sft |= {"learning_rate": 2e-2, "epochs": 3}
    recipe["stages"] = [sft]
    run = tunesmith.run(recipe)
    tunesmith.merge(run)
    return run


def _stages(recipe: dict[str, object]) -> list[dict[str, object]]:
    stages = recipe["stages"]
    assert isinstance(stages, list)
    return [dict(stage) for stage in stages]


def _dpo_from(inputs: Path, name: str, start: str, **changes: object) -> Path:
    recipe = tiny_recipe(inputs, name=name)
    recipe["stages"] = [_stages(recipe)[1] | {"start": start} | changes]
    return tunesmith.run(recipe)


def _first(run: Path, stage: str = "dpo") -> dict[str, float]:
    first: dict[str, float] = json.loads((run / f"stages/{stage}/metrics.jsonl").read_text().splitlines()[0])
    return first


@pytest.mark.parametrize("tuning", [{"kind": "lora", "r": 4, "alpha": 8}, {"kind": "full"}], ids=["lora", "full"])
@pytest.mark.parametrize("start", ["base", "run", "stage", "adapter", "merged"])
def test_the_first_step_is_ln_2_from_every_start(
    start: str, tuning: dict[str, object], inputs: Path, earlier: Path
) -> None:
    starts = {
        "base": "base",
        "run": str(earlier),
        "stage": f"{earlier}:sft",
        "adapter": str(earlier / "stages/sft/adapter"),
        "merged": str(earlier / "merged/sft"),
    }
    run = _dpo_from(inputs, f"{start}-{tuning['kind']}", starts[start], tuning=tuning)
    first = _first(run)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["margin"] == pytest.approx(0, abs=1e-5)
    bare = _first(_dpo_from(inputs, f"bare-{tuning['kind']}", "base", tuning=tuning))
    moved = abs(first["logprob_chosen"] - bare["logprob_chosen"])
    assert moved < 1e-4 if start == "base" else moved > 0.5  # it does start from the SFT weights


def test_the_later_steps_learn(inputs: Path, earlier: Path) -> None:
    run = _dpo_from(inputs, "learns", str(earlier), epochs=4)
    records = [json.loads(line) for line in (run / "stages/dpo/metrics.jsonl").read_text().splitlines()]
    assert len(records) == 8
    assert records[-1]["loss"] < records[0]["loss"]
    assert records[-1]["accuracy"] > 0.9


def test_the_reference_of_an_sft_stage_in_memory_is_its_result(inputs: Path) -> None:
    run = tunesmith.run(tiny_recipe(inputs, name="chain"))
    assert _first(run)["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert json.loads((run / "stages/dpo/result.json").read_text())["kind"] == "adapter"


def test_an_adapter_of_another_shape_is_refused(inputs: Path, earlier: Path) -> None:
    with pytest.raises(ModelError, match="the recipe's would be"):
        _dpo_from(inputs, "rank", str(earlier), tuning={"kind": "lora", "r": 8, "alpha": 8})


def test_an_adapter_of_another_base_is_refused(inputs: Path, earlier: Path, tmp_path: Path) -> None:
    make_model_folder(tmp_path / "other", family="qwen2")
    adapter = str(earlier / "stages/sft/adapter")
    recipe = tiny_recipe(inputs, name="other-base", model={"path": str(tmp_path / "other")})
    recipe["stages"] = [_stages(recipe)[1] | {"start": adapter}]
    with pytest.raises(RecipeError, match="the adapter was trained on"):
        tunesmith.run(recipe)


def test_a_state_space_model_runs_one_answer_a_row(tmp_path: Path) -> None:
    inputs = make_run_inputs(tmp_path)
    make_model_folder(tmp_path / "mamba", family="mamba")
    recipe = tiny_recipe(inputs, model={"path": str(tmp_path / "mamba")})
    for stage in _stages(recipe):
        stage["tuning"] = {"kind": "full"}
    recipe["stages"] = [stage | {"tuning": {"kind": "full"}, "learning_rate": 1e-4} for stage in _stages(recipe)]
    report = tunesmith.check(recipe)
    assert report.ok
    assert any("row of its own" in line.text for line in report.lines)
    run = tunesmith.run(recipe)
    assert _first(run)["loss"] == pytest.approx(math.log(2), abs=1e-5)
