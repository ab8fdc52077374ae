from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from tunesmith.errors import ResumeError, RunFolderError
from tunesmith.runs.folder import create_or_open, open_run
from tunesmith.version import VERSION


def test_new_run_has_a_manifest_and_is_private(tmp_path: Path) -> None:
    run = create_or_open(tmp_path / "runs", "first")
    manifest = run.read_manifest()
    assert (manifest["kind"], manifest["layout"], manifest["tunesmith"]) == ("tunesmith-run", 1, VERSION)
    assert isinstance(manifest["packages"], dict)
    assert "torch" in manifest["packages"]
    assert stat.S_IMODE(run.path.stat().st_mode) == 0o700


def test_existing_run_is_opened_and_keeps_its_manifest(tmp_path: Path) -> None:
    create_or_open(tmp_path, "first").update_manifest({"template": "abc"})
    run = create_or_open(tmp_path, "first")
    run.update_manifest({"reference": "def"})
    manifest = open_run(run.path).read_manifest()
    assert (manifest["template"], manifest["reference"]) == ("abc", "def")


def test_folder_with_other_files_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("precious")
    with pytest.raises(
        RunFolderError, match=r"thesis: holds files that are no Tunesmith run \(chapter1\.txt\)"
    ) as caught:
        create_or_open(tmp_path, "thesis")
    assert caught.value.exit_code == 2
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter1.txt"]


def test_empty_or_only_locked_folder_becomes_a_run(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "run.lock").write_text("{}")
    assert create_or_open(tmp_path, "empty").read_manifest()


def test_foreign_manifest_is_refused(tmp_path: Path) -> None:
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "manifest.json").write_text('{"name": "a web app"}')
    with pytest.raises(RunFolderError, match="not the manifest of a Tunesmith run"):
        create_or_open(tmp_path, "app")


@pytest.mark.parametrize("content", ["", "{", "[1]", "[" * 5000, '{"kind": NaN', "\x00"])
def test_damaged_manifest_is_a_damaged_run(tmp_path: Path, content: str) -> None:
    create_or_open(tmp_path, "run").manifest_path.write_text(content)
    with pytest.raises(ResumeError, match=r"manifest\.json: cannot be read") as caught:
        create_or_open(tmp_path, "run")
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("name", ["file", "a" * 300])
def test_name_that_cannot_be_a_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunFolderError, match="cannot write") as caught:
        create_or_open(tmp_path, name)
    assert caught.value.exit_code == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable_root(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(RunFolderError, match="Permission denied"):
        create_or_open(tmp_path, "run")


def test_unwritable_root_without_rights_of_a_person(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(path: Path, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(RunFolderError, match=r"cannot write: Permission denied[\s\S]*runs_folder"):
        create_or_open(tmp_path, "run")


def test_open_run_of_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="is not a run folder"):
        open_run(tmp_path)


def test_spaces_and_letters_of_any_language(tmp_path: Path) -> None:
    assert create_or_open(tmp_path / "my runs é 你", "r").read_manifest()


def test_stage_folder_is_made_clean(tmp_path: Path) -> None:
    run = create_or_open(tmp_path, "r")
    stage = run.stage("sft").create()
    (stage.checkpoints / ".tmp-step-9-1").mkdir()
    (stage.path / ".tmp-adapter-1").mkdir()
    stage.create()
    assert sorted(path.name for path in stage.path.rglob("*")) == ["checkpoints"]
    assert run.stage_names() == ["sft"]
