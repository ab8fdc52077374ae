from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tunesmith.errors import LockedError
from tunesmith.runs.lock import run_lock

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


def test_lock_of_another_host_is_believed(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    left = json.dumps({"host": "another-host", "pid": 1, "start": "2026-01-01T00:00:00"})
    path.write_text(left)
    with (
        pytest.raises(LockedError, match=r"process 1 on another-host .* 2026-01-01T00:00:00[\s\S]*delete"),
        run_lock(path),
    ):
        pass
    assert path.read_text() == left


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
