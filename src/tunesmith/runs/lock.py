"""One owner of a run folder at a time.

In: the path of the lock file. Out: a lock that is held, or the error that names its owner. Must not know: what the run
does, torch.

The lock is the kernel's (flock), so it ends with the process, even one that was killed; the file's content says who
holds it: host, pid, when the process began (a pid is given out again), and since when. flock may not reach across hosts
on a network file system, so there a file that another host wrote is believed. Where a file system has no flock, the
file itself is the lock, and its owner is looked up in the process table.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tunesmith.errors import LockedError
from tunesmith.runs.atomic import TEMPORARY, make_folder
from tunesmith.runs.clock import PROC, boot_id, start_ticks
from tunesmith.runs.disk import disk_errors

_NO_FLOCK = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
_NO_LINK = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)

LOCAL = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "bcachefs", "jfs", "overlay", "tmpfs", "ramfs"}
"""File systems that one machine has to itself: who holds no flock there is gone, whatever its host was called. A
container that starts again, and a disk that moves to another machine, have new names."""

_FLAGS = os.O_RDWR | os.O_NOFOLLOW
_MODE = 0o600
_WAIT = "Wait for it, stop it, or give this run another name."


class RunLock:
    """The lock file at `path`; nothing is held before `take`. `tell` hears of a lock that was taken over."""

    def __init__(self, path: Path, *, tell: Callable[[str], None] = lambda text: None) -> None:
        self._path, self._tell = path, tell
        self._handle: int | None = None
        self._pid = os.getpid()

    def take(self) -> None:
        """Hold it; what is held stays held. LockedError (exit 6) names the owner where there is another."""
        if self._handle is not None:
            return
        with disk_errors(self._path):
            make_folder(self._path.parent)
            self._handle = self._take()

    def release(self) -> None:
        """Give it up and remove the file, if this process holds it."""
        if self._handle is None:
            return
        # A fork of the owner owns nothing; and somebody may have removed the file, so that this one is another's.
        if os.getpid() == self._pid and self._is_ours():
            with suppress(OSError):  # a folder that was removed meanwhile is no reason to fail at the end
                self._path.unlink()
        os.close(self._handle)
        self._handle = None

    def check(self) -> None:
        """LockedError where the file was removed or replaced since, so that another process may own the run."""
        if self._handle is not None and not self._is_ours():
            owner = _owner_at(self._path)
            what = f"process {owner['pid']} on {owner['host']}" if "pid" in owner else "somebody"
            raise LockedError(
                f"{what} has taken this run away: its lock is not this process's any more.",
                where=str(self._path),
                remedy="Nothing more was written. Stop the other process, then run again.",
            )

    def _is_ours(self) -> bool:
        assert self._handle is not None
        return _is_at(self._handle, self._path)

    def _take(self) -> int:
        while True:
            handle = os.open(self._path, _FLAGS | os.O_CREAT, _MODE)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_at(handle, self._path):
                    return self._adopt(handle)
            except BlockingIOError:
                owner = _read(handle)
                os.close(handle)
                raise _locked(self._path, owner, _WAIT) from None
            except OSError as error:
                os.close(handle)
                if error.errno in _NO_FLOCK:
                    return self._take_file()
                raise
            os.close(handle)  # its owner removed it between our open and our lock: try the new one

    def _adopt(self, handle: int) -> int:
        """What nobody holds is ours, unless its owner may sit on another machine."""
        owner = _read(handle)
        is_elsewhere = owner.get("host", socket.gethostname()) != socket.gethostname()
        if is_elsewhere and file_system_of(self._path) not in LOCAL:
            os.close(handle)
            remedy = f"If that process is gone, delete {self._path} and run again."
            raise _locked(self._path, owner, remedy)
        self._say_taken_over(owner)
        os.ftruncate(handle, 0)
        os.pwrite(handle, _ourselves(), 0)
        os.fsync(handle)
        return handle

    def _say_taken_over(self, owner: dict[str, str]) -> None:
        if owner:
            pid, host, start = (owner.get(key, "unknown") for key in ("pid", "host", "start"))
            self._tell(f"process {pid} on {host} began this run at {start} and is gone; its lock is taken over")

    def _take_file(self) -> int:
        """Without flock: the file is made in one step, whole; a stale one is moved away first."""
        temporary = self._path.with_name(f"{TEMPORARY}{self._path.name}-{os.getpid()}")
        self._tell(
            f"{self._path.parent}: this file system has no flock, so {self._path.name} itself is the lock; one that "
            "another host leaves behind has to be deleted by hand"
        )
        while True:
            with suppress(FileExistsError):
                return _create_whole(self._path, temporary)
            owner = _owner_at(self._path)
            if owner and _may_live(owner):
                remedy = _WAIT if owner.get("host") == socket.gethostname() else f"If it is gone, delete {self._path}."
                raise _locked(self._path, owner, remedy)
            with suppress(FileNotFoundError):
                self._move_away(owner, temporary)

    def _move_away(self, owner: dict[str, str], temporary: Path) -> None:
        """Remove the lock of an owner that is gone; of two that try, one does."""
        self._path.rename(temporary)
        if _owner_at(temporary) == owner:
            self._say_taken_over(owner)
        else:  # somebody was faster, and this is theirs: put it back
            with suppress(FileExistsError):
                os.link(temporary, self._path)
        temporary.unlink()


@contextmanager
def run_lock(
    path: Path, *, tell: Callable[[str], None] = lambda text: None, only_if_there: bool = False
) -> Iterator[RunLock]:
    """Hold the lock file at `path` inside; LockedError (exit 6) names the owner where there is one.

    only_if_there: where the folder is not there yet, it is not made, and the lock is not held before its `take`.
    """
    lock = RunLock(path, tell=tell)
    try:
        with disk_errors(path.parent):
            there = path.parent.is_dir()
        if there or not only_if_there:
            lock.take()
        yield lock
    finally:
        lock.release()


def file_system_of(path: Path, *, mounts: Path = PROC / "self/mountinfo") -> str:
    """Kind of file system that `path` lies on, such as ext4 or nfs4; empty where the machine does not say."""
    try:
        lines = mounts.read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    inside, best = path.absolute(), ("", "")
    for line in lines:
        left, _, right = line.partition(" - ")
        fields = left.split()
        if len(fields) < 5 or not right:
            continue
        point = fields[4].encode().decode("unicode_escape")  # blanks are written as \040
        if inside.is_relative_to(point) and len(point) >= len(best[0]):  # the last of equals lies on top
            best = (point, right.split()[0])
    return best[1]


def _is_at(handle: int, path: Path) -> bool:
    try:
        found, ours = path.lstat(), os.fstat(handle)
    except OSError:
        return False
    return (found.st_ino, found.st_dev) == (ours.st_ino, ours.st_dev)


def _create_whole(path: Path, temporary: Path) -> int:
    """The lock file with our name in it; FileExistsError where there is one."""
    with suppress(FileNotFoundError):
        temporary.unlink()
    handle = os.open(temporary, _FLAGS | os.O_CREAT | os.O_EXCL, _MODE)
    try:
        os.pwrite(handle, _ourselves(), 0)
        os.fsync(handle)
        os.link(temporary, path)
    except OSError as error:
        os.close(handle)
        if error.errno not in _NO_LINK:
            raise
        handle = os.open(path, _FLAGS | os.O_CREAT | os.O_EXCL, _MODE)
        os.pwrite(handle, _ourselves(), 0)
        os.fsync(handle)
    finally:
        temporary.unlink()
    return handle


def _may_live(owner: dict[str, str]) -> bool:
    """False where the owner was a process of this machine, and is none any more."""
    if owner.get("host") != socket.gethostname():
        return True
    if owner.get("boot", boot_id()) != boot_id():
        return False
    pid = owner.get("pid", "")
    if not pid.isdigit():
        return False
    ticks = start_ticks(int(pid))
    if ticks is not None:
        return owner.get("process", str(ticks)) == str(ticks)
    return not PROC.is_dir() and _answers(int(pid))


def _answers(pid: int) -> bool:
    """Whether there is such a process, where no process table can be read."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _owner_at(path: Path) -> dict[str, str]:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return {}
    try:
        return _read(handle)
    finally:
        os.close(handle)


def _read(handle: int) -> dict[str, str]:
    """Who wrote the file; empty where nobody did, or where the owner died in the middle of writing."""
    try:
        owner = json.loads(os.pread(handle, 4096, 0))
    except (ValueError, RecursionError):
        return {}
    return {str(key): str(value) for key, value in owner.items()} if isinstance(owner, dict) else {}


def _ourselves() -> bytes:
    owner = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "start": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "process": start_ticks(os.getpid()),
        "boot": boot_id(),
    }
    return json.dumps({key: value for key, value in owner.items() if value is not None}).encode("utf-8")


def _locked(path: Path, owner: dict[str, str], remedy: str) -> LockedError:
    pid, host, start = (owner.get(key, "unknown") for key in ("pid", "host", "start"))
    return LockedError(
        f"process {pid} on {host} has owned this run since {start}.", where=str(path.parent), remedy=remedy
    )
