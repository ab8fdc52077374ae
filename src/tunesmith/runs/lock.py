"""One owner of a run folder at a time.

In: the path of the lock file. Out: a context that holds it. Must not know: what the run does, torch.

The lock is the kernel's (flock), so it ends with the process, even one that was killed; the file's content says who
holds it. flock may not reach across hosts on a network file system, so a file that another host wrote is believed.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tunesmith.errors import LockedError
from tunesmith.runs.atomic import disk_errors


@contextmanager
def run_lock(path: Path) -> Iterator[None]:
    """Hold the lock file at `path`; LockedError (exit 6) names the owner where there is one."""
    handle = _acquire(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def _acquire(path: Path) -> int:
    while True:
        with disk_errors(path):
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = _read_owner(handle)
            os.close(handle)
            raise _locked(path, owner, "Wait for it, stop it, or give this run another name.") from None
        if _is_at(handle, path):
            break
        os.close(handle)  # its owner removed it between our open and our lock: try the new one

    owner = _read_owner(handle)
    if owner.get("host", socket.gethostname()) != socket.gethostname():
        os.close(handle)
        raise _locked(path, owner, f"If that process is gone, delete {path} and run again.")
    _write_owner(handle, path)
    return handle


def _is_at(handle: int, path: Path) -> bool:
    try:
        return path.stat().st_ino == os.fstat(handle).st_ino
    except FileNotFoundError:
        return False


def _read_owner(handle: int) -> dict[str, str]:
    """Who wrote the file; empty where nobody did, or where the owner died in the middle of writing."""
    try:
        owner = json.loads(os.pread(handle, 4096, 0))
    except ValueError:
        return {}
    return {str(key): str(value) for key, value in owner.items()} if isinstance(owner, dict) else {}


def _write_owner(handle: int, path: Path) -> None:
    start = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "start": start}
    with disk_errors(path):
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(owner).encode("utf-8"), 0)
        os.fsync(handle)


def _locked(path: Path, owner: dict[str, str], remedy: str) -> LockedError:
    pid, host, start = (owner.get(key, "unknown") for key in ("pid", "host", "start"))
    return LockedError(
        f"process {pid} on {host} has owned this run since {start}.", where=str(path.parent), remedy=remedy
    )
