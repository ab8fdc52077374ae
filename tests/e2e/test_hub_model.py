"""S20, F12: a base on the hub is read at one commit, by name from the manifest, wherever `main` moves."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.folders import make_model_folder, questions, write_rows
from tests.support.hub import Hub, serving

RUN = """
import json, sys, tunesmith
from tunesmith.errors import TunesmithError
for line in sys.stdin:
    try:
        run = tunesmith.run(json.loads(line))
        manifest = json.loads((run / "manifest.json").read_text())
        base = tunesmith.load(run, "base").policy.weights.full.revision
        print("RESULT", json.dumps([manifest["model_revision"], base]), flush=True)
    except TunesmithError as error:
        print("RESULT", json.dumps([error.exit_code, str(error)]), flush=True)
"""


@contextmanager
def runner(folder: Path, hub: Hub, *, offline: bool = False) -> Iterator[Callable[[dict[str, object]], list[object]]]:
    """Runs recipes in one process of its own: the hub's client reads its settings when it is imported."""
    variables = {"HF_HOME": str(folder / "hf"), "HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_TELEMETRY": "1"}
    variables |= dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"), "01"[offline])
    process = subprocess.Popen(
        [sys.executable, "-c", RUN],
        env={**os.environ, **variables},
        cwd=folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    lines, answers = process.stdin, process.stdout

    def run(recipe: dict[str, object]) -> list[object]:
        lines.write(json.dumps(recipe) + "\n")
        lines.flush()
        found: list[object] = json.loads(next(line[7:] for line in answers if line.startswith("RESULT ")))
        return found

    try:
        yield run
    finally:
        process.kill()
        process.communicate()


def model_files(folder: Path, *, flipped: bool) -> dict[str, bytes]:
    """The model's files; `flipped`: one bit of its weights is another."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    data = bytearray(files["model.safetensors"])
    data[-1] ^= flipped
    return files | {"model.safetensors": bytes(data)}


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, object]:
    make_model_folder(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl", questions(8))
    stage: dict[str, object] = {"name": "sft", "method": "sft", "train": [{"path": "rows.jsonl"}], "batch_size": 4}
    stage |= {"max_length": 128, "schedule": "constant", "warmup_fraction": 0.0, "max_steps": 1}
    return {"name": "tiny", "model": {"path": "org/rows"}, "stages": [stage], "threads": 1}


def test_a_run_goes_on_with_the_commit_that_it_began_on(tmp_path: Path, recipe: dict[str, object]) -> None:
    stages = recipe["stages"]
    assert isinstance(stages, list)
    longer = recipe | {"stages": [stages[0] | {"max_steps": 2}]}
    with serving(Hub(kind="models")) as hub:
        old = hub.push(model_files(tmp_path / "model", flipped=False))
        pin = {"path": "org/rows", "asked": None, "commit": old}
        with runner(tmp_path, hub) as run:
            assert run(recipe) == [pin, old]
            new = hub.push(model_files(tmp_path / "model", flipped=True))
            # trained on, with the old commit; and the comparison's base is the old one too
            assert run(longer) == [pin, old]
            code, message = run(longer | {"model": {"path": "org/rows", "revision": new}})
            assert code == 3 and f"model.revision: {old} -> {new}" in str(message)
            assert run(recipe | {"name": "fresh"})[1] == new
            del hub.commits[old]
            (tmp_path / "hf/hub").rename(tmp_path / "moved")
            code, message = run(longer)
            assert code == 3 and f"the run began on commit {old} of the model, which cannot be had" in str(message)
            shutil.rmtree(tmp_path / "hf/hub", ignore_errors=True)
            (tmp_path / "moved").rename(tmp_path / "hf/hub")
        assert f"revision: {old}  # the commit of the newest when the run began" in _text(tmp_path)
        hub.log.clear()
        with runner(tmp_path, hub, offline=True) as run:
            assert run(longer) == [pin, old]
        assert hub.log == []  # not one request


def _text(folder: Path) -> str:
    return (folder / "runs/tiny/recipe.yaml").read_text()
