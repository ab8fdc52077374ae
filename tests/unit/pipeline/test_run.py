"""Runs: what is skipped, continued, refused and written, on a two-layer model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import tunesmith
from tests.support.folders import make_run_inputs, tiny_recipe
from tunesmith.errors import ResourceError, ResumeError
from tunesmith.pipeline import disk
from tunesmith.recipe.load import load_recipe


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run_inputs(tmp_path_factory.mktemp("inputs"))


def _steady(inputs: Path, name: str, **changes: object) -> dict[str, object]:
    """One SFT stage whose learning rate does not depend on the number of steps."""
    recipe = tiny_recipe(inputs, name=name)
    stages = recipe["stages"]
    assert isinstance(stages, list)
    recipe["stages"] = [stages[0] | {"schedule": "constant", "warmup_fraction": 0.0, "learning_rate": 1e-2} | changes]
    return recipe


def _alone(recipe: dict[str, object]) -> dict[str, object]:
    """In a folder of its own, where there is no finished stage to be copied."""
    return recipe | {"runs_folder": f"{recipe['runs_folder']}-{recipe['name']}"}


def _adapter(run: Path) -> bytes:
    return (run / "stages/sft/adapter/adapter_model.safetensors").read_bytes()


def test_what_a_run_leaves_behind(inputs: Path) -> None:
    run = tunesmith.run(tiny_recipe(inputs))
    assert load_recipe(run / "recipe.yaml").recipe == tunesmith.parse_recipe(tiny_recipe(inputs)).recipe
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["rows"]["dpo"].items() >= {"train": 8, "heldout": 4, "replay": 0}.items()
    assert {"base_sha256", "template_sha256", "stop_ids", "packages"} <= set(manifest)
    for name, method in (("sft", "sft"), ("dpo", "dpo")):
        result = json.loads((run / f"stages/{name}/result.json").read_text())
        assert (result["method"], result["num_steps"], result["kind"]) == (method, 2, "adapter")
        assert result["adapter"] == f"stages/{name}/adapter"  # relative: the run can be moved
        assert len((run / f"stages/{name}/metrics.jsonl").read_text().splitlines()) == 2
    assert not (run / "run.lock").exists()


def test_a_moved_run_still_loads(inputs: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(inputs, name="moved")
    stages = recipe["stages"]
    assert isinstance(stages, list)
    recipe["stages"] = [stages[0] | {"tuning": {"kind": "full"}, "learning_rate": 1e-4}, stages[1]]
    run = tunesmith.run(recipe).rename(tmp_path / "elsewhere")
    assert tunesmith.load(run, "dpo").name == "dpo"
    assert str(tunesmith.load(run, "dpo").policy.weights.full.path).startswith(str(run))


def test_more_steps_go_on_behind_the_last_and_equal_an_uninterrupted_run(inputs: Path) -> None:
    short = tunesmith.run(_steady(inputs, "grown", max_steps=1))
    first = _adapter(short)
    grown = tunesmith.run(_steady(inputs, "grown", max_steps=2))
    whole = tunesmith.run(_alone(_steady(inputs, "whole", max_steps=2)))
    assert _adapter(grown) == _adapter(whole) != first
    metrics = "stages/sft/metrics.jsonl"
    assert (grown / metrics).read_bytes() == (whole / metrics).read_bytes()


def test_more_steps_under_a_decaying_rate_are_refused(inputs: Path) -> None:
    tunesmith.run(_steady(inputs, "decaying", schedule="cosine", max_steps=1))
    with pytest.raises(ResumeError, match=r"max_steps: 1 -> 2"):
        tunesmith.run(_steady(inputs, "decaying", schedule="cosine", max_steps=2))


def test_cadence_may_change(inputs: Path) -> None:
    run = tunesmith.run(_steady(inputs, "cadence"))
    before = _adapter(run)
    tunesmith.run(_steady(inputs, "cadence", save_every=1))
    assert _adapter(run) == before


def test_two_runs_of_one_recipe_are_bitwise_equal(inputs: Path) -> None:
    one, two = tunesmith.run(_steady(inputs, "one")), tunesmith.run(_alone(_steady(inputs, "two")))
    other = tunesmith.run(_steady(inputs, "other") | {"seed": 1})
    assert _adapter(one) == _adapter(two) != _adapter(other)


def test_a_full_disk_is_known_before_training(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "free_bytes", lambda path: 1000)
    with pytest.raises(ResourceError, match="1,000 are free"):
        tunesmith.run(_steady(inputs, "full-disk"))


def test_several_processes_are_refused_by_name(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tunesmith.errors import RecipeError
    from tunesmith.model.machine import Machine

    two = Machine(Machine.cpu().device, rank=0, world_size=2)
    monkeypatch.setattr(Machine, "detect", classmethod(lambda cls, threads=0: two))
    with pytest.raises(RecipeError, match="several processes"):
        tunesmith.run(_steady(inputs, "ranks"))


def test_generation_from_a_loaded_stage(inputs: Path) -> None:
    run = tunesmith.run(tiny_recipe(inputs))
    stage = tunesmith.load(run)
    assert stage.name == "dpo"
    answers = tunesmith.generate(stage, ["Say 3.", "Say 4."], max_new_tokens=5)
    assert len(answers) == 2
    assert answers == tunesmith.generate(stage, ["Say 3.", "Say 4."], max_new_tokens=5)


def test_the_check_reports_and_writes_nothing(inputs: Path) -> None:
    recipe = tiny_recipe(inputs, name="checked")
    report = tunesmith.check(recipe)
    assert report.ok
    subjects = {line.subject for line in report.lines}
    assert {"recipe", "data sft", "template", "stop token", "parity sft", "parity dpo", "disk"} <= subjects
    assert not (inputs / "runs/checked").exists()
