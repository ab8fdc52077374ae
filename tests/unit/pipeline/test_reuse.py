"""Stages that another run has finished: when they are copied, when not, and what the copy is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.support.folders import make_run_inputs, tiny_recipe
from tunesmith.model.results import read_result
from tunesmith.pipeline import reuse
from tunesmith.pipeline.options import RunOptions
from tunesmith.pipeline.run import run_recipe
from tunesmith.recipe.load import load_recipe, parse_recipe
from tunesmith.runs.folder import RunFolder
from tunesmith.train.progress import Silent


class Notes(Silent):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def noted(self, text: str) -> None:
        self.texts.append(text)

    def said(self, part: str) -> bool:
        """Whether a line holds `part`."""
        return any(part in text for text in self.texts)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model and rows, and a finished run of one SFT stage."""
    folder = make_run_inputs(tmp_path_factory.mktemp("inputs"))
    run(folder, "first", runs="origin")
    return folder


def run(inputs: Path, name: str, *, runs: str, reuse: bool = True, **changes: object) -> tuple[RunFolder, Notes]:
    recipe = tiny_recipe(inputs, name=name, runs_folder=str(inputs / runs))
    stages = recipe["stages"]
    assert isinstance(stages, list)
    top = {key: changes.pop(key) for key in ("seed",) if key in changes}
    recipe["stages"] = [stages[0] | {"learning_rate": 1e-2} | changes]
    notes = Notes()
    folder = run_recipe(parse_recipe({**recipe, **top}), observer=notes, options=RunOptions(reuse=reuse))
    return RunFolder(folder), notes


@pytest.fixture
def runs(inputs: Path, tmp_path: Path) -> str:
    """A folder of runs of its own, which holds a copy of the finished run."""
    shutil.copytree(inputs / "origin", tmp_path / "runs")
    return str(tmp_path / "runs")


def first(runs: str) -> Path:
    return Path(runs) / "first"


def test_a_finished_stage_with_equal_inputs_is_copied(inputs: Path, runs: str) -> None:
    again, notes = run(inputs, "second", runs=runs)
    assert notes.said("stage sft: copied from")
    ours, theirs = again.stage("sft"), RunFolder(first(runs)).stage("sft")
    for name in ("adapter/adapter_model.safetensors", "metrics.jsonl", "timings.jsonl"):
        assert (ours.path / name).read_bytes() == (theirs.path / name).read_bytes()
        assert (ours.path / name).stat().st_nlink == 1  # a copy: what becomes of one run does not touch the other
    assert not list(ours.checkpoints.iterdir())
    shutil.rmtree(first(runs))
    assert read_result(again, "sft").num_steps == 2  # it stands without the other run
    assert again.read_manifest()["reused"]["sft"]["run"] == str(first(runs))  # type: ignore[index]
    assert f"# stage sft: copied from {json.dumps(str(first(runs)))}" in again.recipe_path.read_text()
    assert load_recipe(again.recipe_path).recipe.name == "second"
    _, later = run(inputs, "second", runs=runs)
    assert later.said("finished before") or not later.said("copied from")


def test_a_copy_is_what_training_would_have_made(inputs: Path, runs: str) -> None:
    copied, _ = run(inputs, "second", runs=runs)
    trained, notes = run(inputs, "third", runs=runs, reuse=False)
    assert not notes.said("copied from")
    name = "adapter/adapter_model.safetensors"
    assert (copied.stage("sft").path / name).read_bytes() == (trained.stage("sft").path / name).read_bytes()


@pytest.mark.parametrize(
    "changes",
    [{"seed": 1}, {"learning_rate": 2e-2}, {"max_steps": 1}, {"on_nonfinite": "skip"}],
    ids=lambda changes: next(iter(changes)),
)
def test_other_inputs_are_trained(inputs: Path, runs: str, changes: dict[str, object]) -> None:
    _, notes = run(inputs, "second", runs=runs, **changes)
    assert not notes.said("copied from")


@pytest.mark.parametrize("changes", [{"save_every": 1}, {"keep_checkpoints": 5}, {"gradient_checkpointing": "full"}])
def test_what_moves_no_weight_does_not_keep_a_stage_from_being_copied(
    inputs: Path, runs: str, changes: dict[str, object]
) -> None:
    _, notes = run(inputs, "second", runs=runs, **changes)
    assert notes.said("copied from")


def test_under_keep_best_the_evaluations_choose_the_result(inputs: Path, runs: str) -> None:
    best = {"keep": "best", "heldout_fraction": 0.3, "epochs": 2}
    run(inputs, "one", runs=runs, eval_every=1, **best)
    _, other = run(inputs, "two", runs=runs, eval_every=2, **best)
    assert not other.said("copied from")
    _, same = run(inputs, "three", runs=runs, eval_every=1, **best)
    assert same.said("copied from")


def test_an_altered_result_is_told_and_trained(inputs: Path, runs: str) -> None:
    path = first(runs) / "stages/sft/adapter/adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    _, notes = run(inputs, "second", runs=runs)
    assert notes.said("adapter_model.safetensors was altered")
    assert notes.said("not taken from there")
    assert notes.said("stage sft: done")


def test_a_link_in_a_result_is_not_followed(inputs: Path, runs: str) -> None:
    path = first(runs) / "stages/sft/adapter/adapter_model.safetensors"
    path.rename(first(runs) / "elsewhere")
    path.symlink_to(first(runs) / "elsewhere")
    _, notes = run(inputs, "second", runs=runs)
    assert notes.said("symbolic link")
    assert notes.said("stage sft: done")


def test_the_next_whole_one_is_taken(inputs: Path, runs: str) -> None:
    shutil.copytree(first(runs), first(runs).with_name("also"))
    (first(runs).with_name("also") / "stages/sft/adapter/adapter_config.json").unlink()
    _, notes = run(inputs, "second", runs=runs)
    assert notes.said("adapter_config.json is missing")
    assert notes.said(f"copied from {first(runs)}")


def test_damaged_neighbours_are_passed_over(inputs: Path, runs: str) -> None:
    for name, content in (("a", b"{"), ("b", b"[]"), ("c", b"\xff")):
        folder = Path(runs) / name / "stages/sft"
        folder.mkdir(parents=True)
        (folder / "result.json").write_bytes(content)
    _, notes = run(inputs, "second", runs=runs)
    assert notes.said(f"copied from {first(runs)}")


@pytest.mark.parametrize("cut", ["_check", "write_bytes", "_remember", "finish_stage"])
def test_a_copy_that_is_cut_short_is_no_result(
    cut: str, inputs: Path, runs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*args: object, **named: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(reuse, cut, killed)
        with pytest.raises(KeyboardInterrupt):
            run(inputs, "second", runs=runs)
    assert not (Path(runs) / "second/stages/sft/result.json").exists()
    again, notes = run(inputs, "second", runs=runs)
    assert notes.said("copied from")
    name = "adapter/adapter_model.safetensors"
    assert (again.stage("sft").path / name).read_bytes() == (first(runs) / "stages/sft" / name).read_bytes()


def test_a_copy_that_is_trained_further_is_no_copy_any_more(inputs: Path, runs: str) -> None:
    steady = {"schedule": "constant", "warmup_fraction": 0.0}
    run(inputs, "short", runs=runs, max_steps=1, **steady)
    copied, notes = run(inputs, "second", runs=runs, max_steps=1, **steady)
    assert notes.said("copied from")
    grown, _ = run(inputs, "second", runs=runs, max_steps=2, **steady)
    whole, _ = run(inputs, "whole", runs=runs, max_steps=2, reuse=False, **steady)
    assert copied.read_manifest()["reused"] == {}
    assert "copied from" not in grown.recipe_path.read_text()
    for name in ("adapter/adapter_model.safetensors", "metrics.jsonl"):
        assert (grown.stage("sft").path / name).read_bytes() == (whole.stage("sft").path / name).read_bytes()


def test_an_adapter_on_a_model_of_the_other_run_is_not_copied(inputs: Path, tmp_path: Path) -> None:
    def both(name: str, beta: float) -> Notes:
        recipe = tiny_recipe(inputs, name=name, runs_folder=str(tmp_path / "runs"))
        stages = recipe["stages"]
        assert isinstance(stages, list)
        sft = stages[0] | {"tuning": {"kind": "full"}, "learning_rate": 1e-4}
        last = stages[1] | {"name": "last", "beta": beta}
        notes = Notes()
        run_recipe(parse_recipe({**recipe, "stages": [sft, stages[1], last]}), observer=notes)
        return notes

    both("one", 0.1)
    notes = both("two", 0.5)
    assert notes.said("stage sft: copied from")
    assert notes.said("names a base that lies in that run")
    assert notes.said("stage dpo: done")
