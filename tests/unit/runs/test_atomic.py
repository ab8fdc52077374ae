from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path

import pytest

from tunesmith.errors import ResourceError, RunFolderError
from tunesmith.runs import atomic


def test_write_json_replaces_the_old_content_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    atomic.write_json(path, {"a": 1})
    atomic.write_json(path, {"b": "é"})
    assert json.loads(path.read_text("utf-8")) == {"b": "é"}
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_write_json_refuses_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        atomic.write_json(tmp_path / "a.json", {"a": float("nan")})
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_content_and_no_temporary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    atomic.write_text(path, "old")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match=r"device; 3 bytes are needed and [\d,]+ bytes are free") as caught:
        atomic.write_text(path, "new")
    assert caught.value.exit_code == 5
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


def test_sha256_file_of_abc(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    assert atomic.sha256_file(tmp_path / "abc") == hashlib.sha256(b"abc").hexdigest()


def test_publish_folder_appears_whole_under_its_name(tmp_path: Path) -> None:
    target = tmp_path / "step-1"
    with atomic.publish_folder(target) as folder:
        assert folder.name.startswith(atomic.TEMPORARY)
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text("x")
        assert not target.exists()
    assert (target / "inner" / "file").read_text() == "x"
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


def test_publish_folder_replaces_an_older_one(tmp_path: Path) -> None:
    for text in ("old", "new"):
        with atomic.publish_folder(tmp_path / "model") as folder:
            (folder / text).write_text(text)
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["new"]


def test_publish_folder_that_fails_leaves_the_older_one(tmp_path: Path) -> None:
    with atomic.publish_folder(tmp_path / "model") as folder:
        (folder / "old").write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic.publish_folder(tmp_path / "model") as folder:
        (folder / "new").write_text("new")
        raise KeyboardInterrupt
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["old"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_remove_temporaries_removes_files_and_folders_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / ".tmp-step-3-77").mkdir()
    (tmp_path / ".tmp-step-3-77" / "half").write_text("x")
    (tmp_path / ".tmp-a.json-77").write_text("{")
    (tmp_path / "step-2").mkdir()
    assert len(atomic.remove_temporaries(tmp_path)) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["step-2"]
    assert atomic.remove_temporaries(tmp_path / "absent") == []


@pytest.mark.parametrize(
    ("number", "kind", "code"),
    [(errno.ENOSPC, ResourceError, 5), (errno.EIO, ResourceError, 5), (errno.EACCES, RunFolderError, 2)],
)
def test_disk_errors_have_exit_codes(tmp_path: Path, number: int, kind: type[RunFolderError], code: int) -> None:
    with pytest.raises(kind) as caught, atomic.disk_errors(tmp_path):
        raise OSError(number, os.strerror(number))
    assert caught.value.exit_code == code
    assert str(tmp_path) in str(caught.value)


def test_modes_are_private_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        atomic.make_folder(tmp_path / "runs" / "first")
        atomic.write_text(tmp_path / "runs" / "a.json", "{}")
        atomic.append_bytes(tmp_path / "runs" / "b.jsonl", b"{}\n")
        with atomic.publish_folder(tmp_path / "runs" / "model") as folder:
            (folder / "inner").mkdir()
            (folder / "inner" / "weights").write_text("by a library")
    finally:
        os.umask(before)
    for path in (tmp_path / "runs", *(tmp_path / "runs").rglob("*")):
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path


def test_planted_links_are_replaced_and_not_followed(tmp_path: Path) -> None:
    victim, path = tmp_path / "victim", tmp_path / "a.json"
    victim.write_text("precious")
    path.symlink_to(victim)
    (tmp_path / f".tmp-a.json-{os.getpid()}").symlink_to(victim)
    atomic.write_text(path, "new")
    assert victim.read_text() == "precious"
    assert not path.is_symlink()
    assert path.read_text() == "new"


def test_planted_links_in_the_place_of_folders_are_replaced_and_not_followed(tmp_path: Path) -> None:
    victim, target = tmp_path / "victim", tmp_path / "model"
    victim.mkdir()
    (victim / "thesis").write_text("precious")
    target.symlink_to(victim)
    (tmp_path / f".tmp-model-{os.getpid()}").symlink_to(victim)
    with atomic.publish_folder(target) as folder:
        (folder / "weights").write_text("new")
    assert [path.name for path in victim.iterdir()] == ["thesis"]
    assert not target.is_symlink()
    assert [path.name for path in target.iterdir()] == ["weights"]


def test_records_are_not_appended_through_a_link(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "metrics.jsonl").symlink_to(victim)
    with pytest.raises(RunFolderError, match="symbolic link"):
        atomic.append_bytes(tmp_path / "metrics.jsonl", b"{}\n")
    assert victim.read_text() == "precious"


def test_a_folder_that_died_between_two_renames_comes_back(tmp_path: Path) -> None:
    """publish_folder moves the old one aside before the new one takes its name."""
    aside = tmp_path / ".tmp-replaced-77-model"
    aside.mkdir()
    (aside / "weights").write_text("old")
    atomic.remove_temporaries(tmp_path)
    assert (tmp_path / "model" / "weights").read_text() == "old"
    aside.mkdir()
    atomic.remove_temporaries(tmp_path)  # with the new one in place it goes
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_is_removed_by_a_second_attempt_too(tmp_path: Path) -> None:
    path = tmp_path / "step-1"
    path.mkdir()
    path.rename(tmp_path / f".tmp-removed-step-1-{os.getpid()}")  # as far as the first came
    atomic.remove_folder(path)
    assert not list(tmp_path.iterdir())


def test_what_a_living_process_writes_beside_the_owner_is_spared_where_that_is_asked(tmp_path: Path) -> None:
    living = tmp_path / f".tmp-report.html-{os.getppid()}"
    for path in (living, tmp_path / f".tmp-a-{os.getpid()}", tmp_path / ".tmp-b-99999999"):
        path.write_bytes(b"")
    atomic.remove_temporaries(tmp_path, spare_living=True)
    assert list(tmp_path.iterdir()) == [living]
    atomic.remove_temporaries(tmp_path)  # where only the owner writes, a number given out anew must not keep it
    assert list(tmp_path.iterdir()) == []
