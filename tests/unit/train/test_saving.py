from __future__ import annotations

import errno
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tunesmith.errors import ResourceError
from tunesmith.runs import disk
from tunesmith.runs.disk import DiskError
from tunesmith.runs.folder import StageFolder
from tunesmith.runs.records import Records
from tunesmith.train.saving import finish_rotation, save_or_rescue

NUMBER = errno.EIO


def writer(broken: Path) -> Callable[[Path], Path]:
    """Writes a checkpoint of one file, but not below `broken`."""

    def write(folder: Path) -> Path:
        if folder.is_relative_to(broken):
            raise DiskError("the disk failed.", number=NUMBER, where=str(folder))
        (folder / "step-3").mkdir()
        (folder / "step-3" / "state.json").write_text("{}")
        return folder / "step-3"

    return write


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StageFolder:
    monkeypatch.setattr(disk, "WAITS_SECONDS", (0.0, 0.0, 0.0))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    folder = StageFolder(tmp_path / "run" / "stages" / "sft").create()
    folder.metrics_path.write_bytes(b'{"step": 1}\n{"step": 2}\n{"st')
    return folder


def save(folder: StageFolder, broken: Path, told: list[str]) -> str:
    """The message of a save of step 3 that fails."""
    records = Records()
    with pytest.raises(ResourceError) as caught:
        save_or_rescue(folder, writer(broken), records=records, step=3, tell=told.append)
    assert caught.value.exit_code == 5
    return str(caught.value)


def test_a_rescue_has_the_stages_layout_and_is_named(stage: StageFolder, tmp_path: Path) -> None:
    told: list[str] = []
    message = save(stage, stage.path, told)
    assert len(told) == 3  # it waited before it gave up
    assert "the state of step 3 is kept in" in message
    found = re.search(rf"`cp -r (\S+)/\. {re.escape(str(stage.path))}/`", message)
    assert found is not None
    place = Path(found[1])
    assert place.parent == tmp_path / "temporary"
    assert place.stat().st_mode & 0o777 == 0o700
    assert (place / "checkpoints" / "step-3" / "state.json").is_file()
    assert (place / "metrics.jsonl").read_bytes() == b'{"step": 1}\n{"step": 2}\n'  # without the torn end


def test_a_rescue_that_fails_too_says_so(stage: StageFolder, tmp_path: Path) -> None:
    message = save(stage, tmp_path, [])
    assert "could not be kept elsewhere either" in message


def test_records_that_cannot_be_read_are_kept_apart(stage: StageFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(self: Records, path: Path) -> bytes:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(Records, "content", gone)
    monkeypatch.setattr(Records, "waiting", lambda self, path: b'{"step": 3}\n')
    message = save(stage, stage.path, [])
    assert "append each file *.rest" in message


def test_what_a_killed_rotation_left_is_removed_and_newer_damage_stays(tmp_path: Path) -> None:
    for step in (2, 4, 9, 10, 11):
        (tmp_path / f"step-{step}").mkdir()
    finish_rotation(tmp_path, newest=10, keep=1, best=4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-10", "step-11", "step-4"]
