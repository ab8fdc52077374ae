from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tunesmith.errors import ResourceError, RunFolderError
from tunesmith.runs import disk
from tunesmith.runs.disk import DiskError, disk_errors, patiently


@pytest.mark.parametrize(
    ("number", "code", "text"),
    [
        (errno.ENOSPC, 5, r"1,234 bytes are needed and [\d,]+ bytes are free"),
        (errno.EDQUOT, 5, r"1,234 bytes are needed"),
        (errno.EIO, 5, "the disk failed: Input/output error"),
        (errno.ESTALE, 5, "the disk failed: Stale file handle"),
        (errno.EROFS, 5, "the disk is read-only"),
        (errno.EACCES, 2, "cannot write: Permission denied"),
        (errno.ELOOP, 2, "is a symbolic link"),
    ],
)
def test_what_a_disk_says_has_a_meaning(tmp_path: Path, number: int, code: int, text: str) -> None:
    with pytest.raises((ResourceError, RunFolderError), match=text) as caught, disk_errors(tmp_path, need_bytes=1234):
        raise OSError(number, os.strerror(number))
    assert caught.value.exit_code == code
    assert caught.value.where == str(tmp_path)
    assert caught.value.remedy


def test_the_systems_number_is_found_in_what_a_library_says(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match="bytes are free") as caught, disk_errors(tmp_path):
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert caught.value.number == errno.ENOSPC
    with pytest.raises(RuntimeError, match="a bug"), disk_errors(tmp_path):
        raise RuntimeError("a bug")


def test_patience_ends_after_four_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(disk.time, "sleep", waited.append)
    attempts: list[int] = []

    def inner() -> None:
        attempts.append(1)
        raise DiskError("gone", number=errno.ESTALE)

    told: list[str] = []
    with pytest.raises(DiskError, match="gone"):
        patiently(lambda: patiently(inner), tell=told.append)  # patience inside patience is not squared
    assert len(attempts) == 4
    assert waited == [0.5, 2.0, 5.0]
    assert len(told) == 3
    assert "Attempt 2 of 4 in 0.5 s" in told[0]


def test_patience_returns_what_a_later_attempt_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "WAITS_SECONDS", (0.0, 0.0, 0.0))
    errors = [DiskError("away", number=errno.EIO), DiskError("away", number=errno.EIO)]

    def work() -> str:
        if errors:
            raise errors.pop()
        return "done"

    assert patiently(work) == "done"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_no_patience_where_waiting_cannot_help(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk.time, "sleep", lambda seconds: pytest.fail("waited"))

    def work() -> None:
        raise DiskError("no", number=number)

    with pytest.raises(DiskError):
        patiently(work)
