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
