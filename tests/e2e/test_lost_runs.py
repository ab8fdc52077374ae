"""F20 in a whole run: exit code 4 and a step that is lost again by the command of the message; or steps left out."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import tunesmith
from tests.support.folders import make_run_inputs, questions, tiny_recipe, write_rows
from tunesmith.cli.main import main
from tunesmith.errors import NumericsError
from tunesmith.pipeline.reproduce import main as reproduce_main
from tunesmith.runs.records import read_records
from tunesmith.train.checkpoint import load_checkpoint


def _poisoned_inputs(folder: Path) -> Path:
    """A base whose layers overflow at one token, which stands in the last of the SFT rows: an untied copy of its
    embedding is infinite there, so that nothing but rows with that token see it."""
    make_run_inputs(folder)
    (model,) = {path.parent for path in folder.rglob("config.json")}
    config = json.loads((model / "config.json").read_text())
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tokenizer = AutoTokenizer.from_pretrained(model)
    (token,) = tokenizer.encode("~", add_special_tokens=False)
    tensors["model.embed_tokens.weight"][token] = math.inf
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    (model / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    rows = questions(8)
    rows[6] = {"question": "Which is number 6?", "answer": "It~"}
    write_rows(folder / "sft.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _poisoned_inputs(tmp_path_factory.mktemp("poisoned"))


def _recipe(inputs: Path, **changes: object) -> dict[str, object]:
    recipe = tiny_recipe(inputs, name=str(changes.pop("name")))
    stages = recipe["stages"]
    assert isinstance(stages, list)
    recipe["stages"] = [{**stages[0], "batch_size": 2, "epochs": 2, "save_every": 0, **changes}]
    return recipe


def test_a_run_that_loses_a_number_ends_with_4_and_its_step_is_lost_again_alone(
    poisoned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command of the message, in a process of its own, gives the same number."""
    recipe = poisoned / "stop.json"
    recipe.write_text(json.dumps(_recipe(poisoned, name="stop")))  # JSON is YAML
    with pytest.raises(SystemExit) as ended:
        main(["run", str(recipe)])
    assert ended.value.code == 4
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert "log-probs that are not finite in" in said
    assert "sft.jsonl:7" in said
    assert "It began in model.embed_tokens: 32 numbers of its weight are not finite." in " ".join(said.split())
    (folder,) = (poisoned / "runs/stop/stages/sft/nonfinite").iterdir()
    assert f"python -m tunesmith.pipeline.reproduce {folder}" in " ".join(said.split())
    command = [sys.executable, "-m", "tunesmith.pipeline.reproduce", str(folder)]
    again = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert (again.returncode, again.stdout.splitlines()[-1]) == (0, "reproduced"), again.stdout + again.stderr
    then, now = again.stdout.splitlines()[:2]
    assert then.split(" of stage sft: ")[1] == now.split(" lost: ")[1]
    assert "log-probs that are not finite in" in then


def test_a_run_that_leaves_steps_out_ends_well_and_says_so(poisoned: Path) -> None:
    """And its result is finite, its count in the last checkpoint."""
    run = tunesmith.run(_recipe(poisoned, name="skip", on_nonfinite="skip"))
    stage = run / "stages/sft"
    records = read_records(stage / "metrics.jsonl")
    assert len(records) == 8
    assert sum(record.get("nonfinite") is True for record in records) == 2
    (adapter,) = (stage / "adapter").glob("*.safetensors")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in load_file(adapter).values())
    assert load_checkpoint(stage / "checkpoints/step-8").state.num_nonfinite == 2


def test_a_reproducer_that_is_none_or_lies_elsewhere(
    poisoned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A copy needs `--run`; without one, and for any other folder, the error says so."""
    assert reproduce_main([str(tmp_path)]) == 2
    assert "is no folder of a step that lost a number" in capsys.readouterr().err
    with pytest.raises(NumericsError):
        tunesmith.run(_recipe(poisoned, name="copied"))
    (folder,) = (poisoned / "runs/copied/stages/sft/nonfinite").iterdir()
    copy = shutil.copytree(folder, tmp_path / "a/b/c/copy")
    assert reproduce_main([str(copy)]) == 2
    assert "is not a run folder" in capsys.readouterr().err
    assert reproduce_main([str(copy), "--run", str(poisoned / "runs/copied")]) == 0
    assert capsys.readouterr().out.endswith("reproduced\n")
