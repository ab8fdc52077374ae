from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tunesmith.errors import LockedError, RunFolderError
from tunesmith.runs import lock as locks
from tunesmith.runs.clock import boot_id, start_ticks
from tunesmith.runs.lock import file_system_of, run_lock

HOLD = """
import sys
from pathlib import Path
from tunesmith.runs.lock import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(path: Path) -> subprocess.Popen[str]:
    """Another process that holds the lock until its standard input closes."""
    command = [sys.executable, "-c", HOLD, str(path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_second_process_is_told_pid_host_and_start(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    process = hold(path)
    start = json.loads(path.read_text())["start"]
    with pytest.raises(LockedError) as caught, run_lock(path):
        pass
    message = str(caught.value)
    assert caught.value.exit_code == 6
    assert f"process {process.pid} on {socket.gethostname()} has owned this run since {start}" in message
    process.communicate()
    with run_lock(path):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert not path.exists()


def test_lock_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    process = hold(path)
    process.kill()
    process.communicate()
    assert path.exists()
    with run_lock(path):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_lock_left_by_a_dead_pid_or_torn_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    for left in (json.dumps({"host": socket.gethostname(), "pid": 999999999, "start": "x"}), '{"host": "el', ""):
        path.write_text(left)
        with run_lock(path):
            pass
        assert not path.exists()


@pytest.mark.parametrize("kind", ["nfs4", "fuse.sshfs", ""])
def test_lock_of_another_host_is_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(locks, "file_system_of", lambda path: kind)
    path = tmp_path / "run.lock"
    left = json.dumps({"host": "another-host", "pid": 1, "start": "2026-01-01T00:00:00"})
    path.write_text(left)
    with (
        pytest.raises(LockedError, match=r"process 1 on another-host .* 2026-01-01T00:00:00[\s\S]*delete"),
        run_lock(path),
    ):
        pass
    assert path.read_text() == left


def test_on_a_disk_of_this_machine_another_host_is_an_old_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "file_system_of", lambda path: "ext4")
    path = tmp_path / "run.lock"
    path.write_text(json.dumps({"host": "pod-1", "pid": 12, "start": "2026-01-01T00:00:00"}))
    said: list[str] = []
    with run_lock(path, tell=said.append):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert said == ["process 12 on pod-1 began this run at 2026-01-01T00:00:00 and is gone; its lock is taken over"]


def test_lock_is_released_by_an_error(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    with pytest.raises(RuntimeError), run_lock(path):
        raise RuntimeError
    assert not path.exists()


def test_same_process_cannot_hold_it_twice(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    with run_lock(path):
        with pytest.raises(LockedError), run_lock(path):
            pass
        assert path.exists()  # the refused one did not remove it


def test_the_owner_is_named_by_process_start_and_boot_too(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    with run_lock(path):
        owner = json.loads(path.read_text())
        assert (owner["process"], owner["boot"]) == (start_ticks(os.getpid()), boot_id())
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_folder_that_is_not_there_is_made_only_when_it_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "runs/tiny/run.lock"
    with run_lock(path, only_if_there=True) as lock:
        assert not path.parent.parent.exists()
        lock.take()
        assert path.exists()
        lock.take()  # what is held stays held
    assert not path.exists()


def test_a_planted_link_is_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_text("mine")
    (tmp_path / "run.lock").symlink_to(target)
    with pytest.raises(RunFolderError), run_lock(tmp_path / "run.lock"):
        pass
    assert target.read_text() == "mine"


def test_a_lock_that_was_deleted_is_noticed_and_the_next_owner_named(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    with run_lock(path) as lock:
        lock.check()
        path.unlink()
        process = hold(path)
        with pytest.raises(LockedError, match=f"process {process.pid} .* has taken this run away"):
            lock.check()
    assert path.exists()  # the other's lock is left alone
    process.communicate()


def test_a_fork_does_not_release_the_lock_of_its_parent(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    lock = locks.RunLock(path)
    lock.take()
    pid = os.fork()
    if pid == 0:
        lock.release()
        os._exit(0)
    os.waitpid(pid, 0)
    assert path.exists()
    with pytest.raises(LockedError), run_lock(path):
        pass
    lock.release()


@pytest.fixture
def no_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    """As NFS without its lock service, and some user-space file systems."""

    def flock(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.usefixtures("no_flock")
def test_without_flock_the_file_is_the_lock_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    said: list[str] = []
    with run_lock(path, tell=said.append):
        assert "has no flock" in said[0]
        with pytest.raises(LockedError, match=f"process {os.getpid()} on"), run_lock(path):
            pass
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_flock")
@pytest.mark.parametrize("linkable", [True, False])
def test_without_flock_a_dead_owner_is_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, linkable: bool
) -> None:
    if not linkable:

        def link(source: Path, target: Path) -> None:
            raise OSError(errno.ENOTSUP, "Operation not supported")

        monkeypatch.setattr(os, "link", link)
    path = tmp_path / "run.lock"
    me = {"host": socket.gethostname(), "pid": os.getpid(), "start": "x", "boot": boot_id()}
    dead: list[dict[str, object]] = [
        me | {"pid": 999999999},
        me | {"process": 1},  # the number was given out again: this process began later
        me | {"boot": "another"},  # the machine has started anew
    ]
    for owner in dead:
        path.write_text(json.dumps(owner))
        said: list[str] = []
        with run_lock(path, tell=said.append):
            assert "taken over" in said[1]
            assert json.loads(path.read_text())["process"] == start_ticks(os.getpid())
    path.write_text("")  # torn: nobody's
    with run_lock(path):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_flock")
def test_without_flock_another_host_is_believed(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    path.write_text(json.dumps({"host": "another-host", "pid": 999999999, "start": "x"}))
    with pytest.raises(LockedError, match=r"another-host[\s\S]*delete"), run_lock(path):
        pass
    assert path.exists()


def test_the_kind_of_file_system_is_the_innermost_mount(tmp_path: Path) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "1 0 8:1 / / rw - ext4 /dev/sda1 rw\n"
        "2 1 0:40 / /home rw,relatime shared:1 - nfs4 server:/home rw\n"
        "3 2 8:2 / /home/a\\040disk rw master:2 shared:3 - xfs /dev/sdb1 rw\n"
        "broken\n"
    )
    places = ("/tmp/run.lock", "/home" + "/me/run.lock", "/home/a disk/run.lock", "/homes/run.lock")
    assert [file_system_of(Path(place), mounts=mounts) for place in places] == ["ext4", "nfs4", "xfs", "ext4"]
    assert file_system_of(Path("/"), mounts=tmp_path / "absent") == ""
