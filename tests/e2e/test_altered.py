"""R3, F7 to F9: whoever reads a stage reads what was trained, or is refused with exit code 3 and the file's name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import tunesmith
from tests.support.folders import make_run_inputs, tiny_recipe
from tunesmith.errors import ResumeError
from tunesmith.pipeline.options import RunOptions
from tunesmith.pipeline.run import run_recipe
from tunesmith.recipe.load import LoadedRecipe, parse_recipe
from tunesmith.train.progress import Silent


class Notes(Silent):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def noted(self, text: str) -> None:
        self.texts.append(text)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_run_inputs(tmp_path_factory.mktemp("inputs"))
    tunesmith.run(recipe(folder, folder / "runs"))
    return folder


def recipe(inputs: Path, runs: Path) -> dict[str, object]:
    stages = tiny_recipe(inputs)["stages"]
    assert isinstance(stages, list)
    saving = [stage | {"save_every": 1, "keep_checkpoints": 2} for stage in stages]
    return tiny_recipe(inputs, runs_folder=str(runs), stages=saving)


def loaded(inputs: Path, runs: Path) -> LoadedRecipe:
    return parse_recipe(recipe(inputs, runs))


@pytest.fixture
def run(inputs: Path, tmp_path: Path) -> Path:
    """A finished run of its own for each test."""
    shutil.copytree(inputs / "runs", tmp_path / "runs")
    return tmp_path / "runs" / "tiny"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


READERS: dict[str, Callable[[Path, Path], object]] = {
    "run": lambda inputs, run: run_recipe(loaded(inputs, run.parent), observer=Silent()),
    "compare": lambda inputs, run: tunesmith.compare(run),
    "merge": lambda inputs, run: tunesmith.merge(run, "sft"),
    "chat": lambda inputs, run: tunesmith.load(run, "sft"),
    "start": lambda inputs, run: tunesmith.run(
        tiny_recipe(inputs, name="next", runs_folder=str(run.parent), stages=_dpo_from(inputs, run))
    ),
}


def _dpo_from(inputs: Path, run: Path) -> list[dict[str, object]]:
    stages = tiny_recipe(inputs)["stages"]
    assert isinstance(stages, list)
    return [stages[1] | {"start": f"{run}:sft"}]


@pytest.mark.parametrize("reader", READERS)
def test_an_altered_result_is_refused_whoever_reads_it(inputs: Path, run: Path, reader: str) -> None:
    flip(run / "stages/sft/adapter/adapter_model.safetensors")
    with pytest.raises(ResumeError, match=r"adapter_model\.safetensors was altered") as caught:
        READERS[reader](inputs, run)
    assert caught.value.exit_code == 3


def test_the_result_is_made_again_as_the_remedy_says(inputs: Path, run: Path) -> None:
    path = run / "stages/dpo/adapter/adapter_model.safetensors"
    before = path.read_bytes()
    flip(path)
    (run / "stages/dpo/result.json").unlink()
    run_recipe(loaded(inputs, run.parent), observer=Silent())
    assert path.read_bytes() == before


def unfinished(run: Path) -> Path:
    """The run as it is when its second stage died behind its last save."""
    (run / "stages/dpo/result.json").unlink()
    return run / "stages/dpo/checkpoints"


@pytest.mark.parametrize("name", ["trainable.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_strict_refuses_and_changes_nothing(inputs: Path, run: Path, name: str) -> None:
    checkpoints = unfinished(run)
    flip(checkpoints / "step-2" / name)
    before = {path: path.read_bytes() for path in (run / "stages").rglob("*") if path.is_file()}
    with pytest.raises(ResumeError, match=name.replace(".", r"\.")) as caught:
        run_recipe(loaded(inputs, run.parent), observer=Silent(), options=RunOptions(strict=True))
    assert caught.value.exit_code == 3
    assert before == {path: path.read_bytes() for path in before}


def test_without_strict_it_walks_back_says_so_and_ends_equal(inputs: Path, run: Path) -> None:
    checkpoints = unfinished(run)
    whole = {
        path: path.read_bytes() for folder in ("adapter", "checkpoints") for path in _files(run / "stages/dpo" / folder)
    }
    flip(checkpoints / "step-2" / "optimizer.safetensors")
    notes = Notes()
    run_recipe(loaded(inputs, run.parent), observer=notes)
    said = [text for text in notes.texts if "step-2" in text]
    assert len(said) == 1
    assert "optimizer.safetensors was altered" in said[0]
    assert "Going back to an older one" in said[0]
    assert whole == {path: path.read_bytes() for path in whole}


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]
