from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tunesmith.errors import ModelError, ResumeError, RunFolderError
from tunesmith.model.policy import Weights
from tunesmith.model.results import StageResult, read_result, run_recipe_of, write_result
from tunesmith.model.trust import remote_code
from tunesmith.recipe.models import Model
from tunesmith.runs.folder import RunFolder, create_or_open

NAMES = ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json")


def finished(root: Path, stage: str = "sft", *, full: bool = False, base: str = "/base") -> RunFolder:
    """A run with a finished stage, its weights some bytes."""
    run = create_or_open(root, "run")
    folder = run.stage(stage).model_path if full else run.stage(stage).adapter_path
    folder.mkdir(parents=True)
    for name in NAMES:
        (folder / name).write_bytes(name.encode())
    weights = Weights(Model(path=str(folder))) if full else Weights(Model(path=base), folder)
    result = StageResult(stage, "sft", weights, 7, (2, 5), "inputs", 1, None)
    write_result(run, result, weights_sha="w", template_sha="t")
    return run


def test_it_names_every_file(tmp_path: Path) -> None:
    run = finished(tmp_path)
    content = json.loads(run.stage("sft").result_path.read_text())
    assert sorted(content["files"]) == sorted(NAMES)
    sha = "224931eb13f8d2471acd38a4a0d7417d20e8ea340160a467ceaa359d25197b87"  # of the bytes `tokenizer.json`
    assert content["files"]["tokenizer.json"] == {"bytes": 14, "sha256": sha}
    result = read_result(run, "sft")
    assert (result.num_steps, result.stop_ids, result.files) == (7, (2, 5), content["files"])


def test_a_moved_run_is_read(tmp_path: Path) -> None:
    finished(tmp_path / "here", full=True)
    shutil.move(tmp_path / "here", tmp_path / "there")
    result = read_result(RunFolder(tmp_path / "there" / "run"), "sft")
    assert result.weights.full.path == str(tmp_path / "there/run/stages/sft/model")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def link(path: Path) -> None:
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("damage", [flip, halve, Path.unlink, link])
def test_an_altered_file_is_refused_by_name(tmp_path: Path, name: str, damage: Callable[[Path], None]) -> None:
    run = finished(tmp_path)
    damage(run.stage("sft").adapter_path / name)
    with pytest.raises(ResumeError, match=name.replace(".", r"\.")) as caught:
        read_result(run, "sft")
    assert caught.value.exit_code == 3
    assert "result.json" in caught.value.remedy


def test_an_added_file_is_refused_and_a_card_is_not(tmp_path: Path) -> None:
    run = finished(tmp_path)
    (run.stage("sft").adapter_path / "README.md").write_text("what this is")
    read_result(run, "sft")
    (run.stage("sft").adapter_path / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(ResumeError, match=r"adapter_model\.bin was added"):
        read_result(run, "sft")


def test_every_byte_of_the_result_counts(tmp_path: Path) -> None:
    """A flipped bit is refused, or is white space that became other white space."""
    run = finished(tmp_path)
    path = run.stage("sft").result_path
    data = path.read_bytes()
    for place in range(0, len(data), 3):
        changed = bytearray(data)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        try:
            read_result(run, "sft")
        except ResumeError as error:
            assert "result.json" in error.where
        else:
            assert json.loads(changed) == json.loads(data)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 50_000, '{"stage": 1}'])
def test_what_is_no_result_is_refused(tmp_path: Path, text: str) -> None:
    run = finished(tmp_path)
    run.stage("sft").result_path.write_text(text)
    with pytest.raises(ResumeError, match="cannot be read"):
        read_result(run, "sft")


def test_a_number_that_is_none_is_refused(tmp_path: Path) -> None:
    """Of an earlier version's result, which has no hash of itself."""
    run = finished(tmp_path)
    path = run.stage("sft").result_path
    content = json.loads(path.read_text())
    del content["files"], content["sha256"]
    path.write_text(json.dumps(content).replace('"num_steps": 7', '"num_steps": 1e999'))
    with pytest.raises(ResumeError, match="cannot be read"):
        read_result(run, "sft")


def test_another_stage_s_result_is_refused(tmp_path: Path) -> None:
    run = finished(tmp_path)
    shutil.copytree(run.stage("sft").path, run.stage("dpo").path)
    with pytest.raises(ResumeError, match="is of the stage 'sft'"):
        read_result(run, "dpo")


def test_a_result_without_hashes_is_of_an_earlier_version(tmp_path: Path) -> None:
    """R7: results of 0.1.0 before this named no files; they still load, and say so by `files`."""
    run = finished(tmp_path)
    path = run.stage("sft").result_path
    content = json.loads(path.read_text())
    del content["files"], content["sha256"]
    path.write_text(json.dumps(content))
    assert read_result(run, "sft").files is None


def test_the_model_below_an_adapter_is_looked_at_too(tmp_path: Path) -> None:
    run = finished(tmp_path, "full", full=True)
    finished(tmp_path, "dpo", base=str(run.stage("full").model_path))
    read_result(run, "dpo")
    flip(run.stage("full").model_path / NAMES[1])
    with pytest.raises(ResumeError, match=NAMES[1]):
        read_result(run, "dpo")


def test_an_unfinished_stage_is_no_damage(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="has no result"):
        read_result(finished(tmp_path), "dpo")


def test_a_commit_that_a_run_found_by_itself_is_none_that_a_person_read(tmp_path: Path) -> None:
    run = create_or_open(tmp_path, "run")
    commit = "a" * 40
    recipe = {"name": "run", "model": {"path": "org/own", "revision": commit}}
    recipe["stages"] = [{"name": "sft", "method": "sft", "train": [{"path": "a.jsonl"}]}]
    run.recipe_path.write_text(json.dumps(recipe))
    run.update_manifest({"model_revision": {"path": "org/own", "asked": None, "commit": commit}})
    assert run_recipe_of(run).model.revision == commit
    with remote_code(), pytest.raises(ModelError, match="only run at a pinned commit"):
        run_recipe_of(run)
    run.update_manifest({"model_revision": {"path": "org/own", "asked": commit, "commit": commit}})
    with remote_code():
        assert run_recipe_of(run).model.revision == commit
