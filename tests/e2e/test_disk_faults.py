"""Faults at every file operation of a save: kills, a failing or full disk, the power (F2 to F6, F17; R2; trap 64)."""

from __future__ import annotations

import errno
import os
import random
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.support import power
from tests.support.faults import ERRORS, Died, Faults, installed
from tests.support.little_stage import SAVED, content, newest_whole, run
from tunesmith.errors import ResourceError, RunFolderError, TunesmithError
from tunesmith.runs import disk

BEGUN, LAST = 9, 11


@pytest.fixture(autouse=True)
def _quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No pauses between attempts; rescues go where the test can see them."""
    monkeypatch.setattr(disk, "WAITS_SECONDS", (0.0, 0.0, 0.0))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))


def little(path: Path, *, faults: Faults | None = None, **settings: Any) -> int:
    """The little stage under `faults`, or with none."""
    with installed(faults or Faults(path)):
        return run(path, **settings)


def begun(tmp_path: Path, *, keep: int, step: int = BEGUN) -> tuple[Path, dict[str, bytes], int]:
    """A stage that has done some steps, the bytes of one that was never disturbed, and the operations of a step."""
    start, whole = tmp_path / "start", tmp_path / "whole"
    little(start, last=step, keep=keep)
    shutil.copytree(start, whole)
    counter = Faults(whole)
    little(whole, last=step + 1, keep=keep, faults=counter)
    little(whole, last=step + 2, keep=keep)
    return start, content(whole), len(counter.log)


def again(path: Path, start: Path) -> Path:
    """A fresh copy of `start` at `path`."""
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(start, path)
    return path


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_death_before_and_after_every_operation_of_a_save(tmp_path: Path, keep: int) -> None:
    start, whole, num_operations = begun(tmp_path, keep=keep)
    assert num_operations > 40
    draw = random.Random(keep)
    for number in range(num_operations + 1):  # after an operation is before the next
        path = again(tmp_path / "stage", start)
        with pytest.raises(Died):
            little(path, last=LAST, keep=keep, faults=Faults(path, number))
        assert newest_whole(path) >= BEGUN, number
        recovery = Faults(path, draw.randrange(num_operations // 2))  # the next start dies too, somewhere
        with pytest.raises(Died):
            little(path, last=LAST, keep=keep, faults=recovery)
        assert newest_whole(path) >= BEGUN, (number, recovery.log[-1])
        assert little(path, last=LAST, keep=keep) >= BEGUN
        assert content(path) == whole, number


def test_rotation_from_99_to_100(tmp_path: Path) -> None:
    start, whole, num_operations = begun(tmp_path, keep=1, step=99)
    for number in range(num_operations - 15, num_operations):  # the rename into place, and the removal of step 99
        path = again(tmp_path / "stage", start)
        with pytest.raises(Died):
            little(path, last=101, keep=1, faults=Faults(path, number))
        assert newest_whole(path) >= 99
        little(path, last=101, keep=1)
        assert content(path) == whole, number


@pytest.mark.parametrize("number", ERRORS, ids=errno.errorcode.get)
def test_a_disk_that_fails_for_good_at_any_operation(tmp_path: Path, number: int) -> None:
    start, whole, num_operations = begun(tmp_path, keep=1)
    rescues, operations = 0, range(0, num_operations, 1 if number in (errno.EIO, errno.ENOSPC) else 3)
    for at in operations:
        path = again(tmp_path / "stage", start)
        faults = Faults(path, at, number)
        try:
            little(path, last=LAST, keep=1, faults=faults)
        except TunesmithError as error:
            assert error.exit_code == 5, (at, error)
            assert newest_whole(path) >= BEGUN, at
            if number == errno.ENOSPC:
                assert not [each for each in path.rglob(".tmp-*") if "removed" not in each.name]
                assert re.search(r"[\d,]+ bytes", str(error))
            rescues += _go_on(path, str(error), at)
        assert little(path, last=LAST, keep=1) >= BEGUN
        assert content(path) == whole, (at, faults.log[at])
    assert rescues > len(operations) // 2


def _go_on(path: Path, message: str, at: int) -> bool:
    """Copy the rescue back by the command that the error gives, every second time; whether there was a rescue."""
    command = re.search(r"`(cp -r \S+ \S+)`", message)
    if command is None:
        assert newest_whole(path) > BEGUN, (at, message)  # the step was saved before the disk failed
        return False
    if at % 2:
        subprocess.run(command[1].split(), check=True)
        assert newest_whole(path) > BEGUN
    return True


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE], ids=errno.errorcode.get)
def test_a_disk_that_fails_once_costs_nothing(tmp_path: Path, number: int) -> None:
    start, whole, num_operations = begun(tmp_path, keep=2)
    for at in range(0, num_operations, 1 if number == errno.EIO else 3):
        for after in (False, True):
            path = again(tmp_path / "stage", start)
            faults = Faults(path, at, number, after=after, lasting=False)
            little(path, last=LAST, keep=2, faults=faults)
            assert content(path) == whole, (at, after, faults.log[at])


@pytest.mark.parametrize("keep", [1, 2])
def test_the_power_goes_after_any_operation(tmp_path: Path, keep: int) -> None:
    start, whole, _ = begun(tmp_path, keep=keep)
    path = again(tmp_path / "stage", start)
    for place, saved in _power_cuts(path, tmp_path / "cuts", last=BEGUN + 1, keep=keep, num_random=3):
        assert newest_whole(place) >= saved, place
        assert little(place, last=LAST, keep=keep) >= saved
        assert content(place) == whole, place
        shutil.rmtree(place)


def test_the_power_goes_while_a_stage_begins(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    little(whole, last=2)
    (tmp_path / "runs").mkdir()
    for place, saved in _power_cuts(tmp_path / "runs", tmp_path / "cuts", last=1, inner="stage", num_random=3):
        assert not saved or newest_whole(place / "stage") >= saved
        little(place / "stage", last=2)
        assert content(place / "stage") == content(whole), place


def _power_cuts(
    root: Path, cuts: Path, *, last: int, num_random: int, keep: int = 2, inner: str = "."
) -> list[tuple[Path, int]]:
    """Run with the power gone after each operation; every disk that may be left, and the step that must be on it."""
    shadow, draw = power.Disk(root), random.Random(last)
    found: list[tuple[Path, int]] = []
    seen: set[tuple[int, str]] = set()
    saved = newest_whole(root / inner)
    cuts.mkdir()

    def watch(name: str, given: tuple[Any, ...]) -> None:
        shadow.watch(name, given)
        for outcome in shadow.outcomes(draw, num_random):
            if (key := (saved, power.key_of(outcome))) in seen:
                continue
            seen.add(key)
            place = cuts / f"{len(found)}-{name}-{Path(str(given[0])).name}"
            power.write(outcome, place)
            found.append((place, saved))

    def tell(text: str) -> None:
        nonlocal saved
        saved += text == SAVED

    little(root / inner, last=last, keep=keep, tell=tell, faults=Faults(root, watch=watch))
    return found


def test_the_power_model_loses_what_was_not_synced(tmp_path: Path) -> None:
    """A save without fsync is lost by the model, else the test above proves nothing."""
    root = tmp_path / "root"
    root.mkdir()
    shadow = power.Disk(root)
    with installed(Faults(root, watch=shadow.watch)):
        handle = os.open(root / "new", os.O_WRONLY | os.O_CREAT)
        os.write(handle, b"precious")
        os.close(handle)
        (root / "new").rename(root / "file")
    outcomes = [outcome.names for outcome in shadow.outcomes(random.Random(0), 20)]
    found = {node.data for names in outcomes for node in names.values() if isinstance(node, power.File)}
    assert {} in outcomes
    assert {b"", b"precious"} < found  # and torn ones


@pytest.mark.parametrize("umask", [0o000, 0o077, 0o022])
def test_modes_are_private_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        run(tmp_path / "stage", last=2)
    finally:
        os.umask(before)
    for path in (tmp_path / "stage").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path


@pytest.mark.parametrize("name", ["metrics.jsonl", "eval.jsonl", "timings.jsonl"])
def test_a_link_in_the_place_of_records_is_not_followed(tmp_path: Path, name: str) -> None:
    victim = tmp_path / "victim"
    victim.write_text("")
    (tmp_path / "stage").mkdir()
    (tmp_path / "stage" / name).symlink_to(victim)
    with pytest.raises((RunFolderError, ResourceError), match="symbolic link"):
        run(tmp_path / "stage", last=2)
    assert victim.read_text() == ""
