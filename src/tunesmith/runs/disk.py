"""What a disk says, as errors that a person can act on; and patience with a disk that may come back.

In: work that writes. Out: its result, or a TunesmithError. Must not know: what is written, torch.

A network file system that is away for a moment answers EIO or ESTALE; the same write works a second later. It is done
again whole, never only its fsync: after a failed fsync the kernel may forget the pages and call the next one a success.
"""

from __future__ import annotations

import errno
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TypeVar

from tunesmith.errors import ResourceError, RunFolderError, TunesmithError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
PASSING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO)
"""Errors of a disk or of the way to it, which may pass."""
WAITS_SECONDS = (0.5, 2.0, 5.0)
"""Pauses before the second, third and fourth attempt: 7.5 s in all, within the deadline of a stop (30 s)."""

_OS_ERROR = re.compile(r"\(os error (\d+)\)")
"""How libraries written in Rust (safetensors, tokenizers) tell the system's number."""
_RETRYING: ContextVar[bool] = ContextVar("retrying", default=False)

T = TypeVar("T")


class DiskError(ResourceError):
    """The disk is full, failing, or has become read-only. `number` is the system's errno."""

    def __init__(self, what: str, *, number: int, where: str = "", remedy: str = "") -> None:
        super().__init__(what, where=where, remedy=remedy)
        self.number = number


@contextmanager
def disk_errors(path: Path, *, need_bytes: int | None = None) -> Iterator[None]:
    """Turn what the disk says into DiskError (5), or RunFolderError (2) where it is a matter of rights or names.

    need_bytes: what is to be written, which the error names where the disk is full.
    """
    try:
        yield
    except OSError as error:
        number, reason = error.errno or 0, error.strerror or str(error)
        raise _meaning(number, reason, path, need_bytes) from error
    except TunesmithError:
        raise
    except Exception as error:
        found = _OS_ERROR.search(str(error))
        if found is None:
            raise
        raise _meaning(int(found[1]), str(error), path, need_bytes) from error


def free_bytes(path: Path) -> int:
    """Bytes that are free on the disk of `path`, or of its nearest existing parent."""
    folder = path
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    usage = shutil.disk_usage(folder)
    return usage.free if usage.total else sys.maxsize  # some (FUSE, /sys) count nothing


def patiently(work: Callable[[], T], *, tell: Callable[[str], None] | None = None) -> T:
    """Do `work`; where the disk fails in a way that may pass, wait and do all of it again, three times at most.

    Patience inside patience is one patience: only the outermost call does its work again.
    """
    if _RETRYING.get():
        return work()
    token = _RETRYING.set(True)
    try:
        return _repeated(work, tell)
    finally:
        _RETRYING.reset(token)


def _repeated(work: Callable[[], T], tell: Callable[[str], None] | None) -> T:
    for number, seconds in enumerate(WAITS_SECONDS, start=2):
        try:
            return work()
        except DiskError as error:
            if error.number not in PASSING:
                raise
            if tell is not None:
                tell(f"{error.what} Attempt {number} of {len(WAITS_SECONDS) + 1} in {seconds:g} s.")
        time.sleep(seconds)
    return work()


def _meaning(number: int, reason: str, path: Path, need_bytes: int | None) -> TunesmithError:
    where = str(path)
    if number in FULL:
        need = "" if need_bytes is None else f"{need_bytes:,} bytes are needed and "
        remedy = "Make room, then run again."
        return DiskError(f"{reason}; {need}{_free(path)} are free there.", number=number, where=where, remedy=remedy)
    if number in PASSING:
        remedy = "Nothing that was saved before is lost. See to the disk, then run again."
        return DiskError(f"the disk failed: {reason}.", number=number, where=where, remedy=remedy)
    if number == errno.EROFS:
        remedy = "Make it writable again (after errors a disk may be remounted so), or set `runs_folder` to another."
        return DiskError("the disk is read-only.", number=number, where=where, remedy=remedy)
    if number == errno.ELOOP:
        remedy = "Nothing was written through it. Remove the link, then run again."
        return RunFolderError("is a symbolic link where a file of ours belongs.", where=where, remedy=remedy)
    remedy = "Choose another `runs_folder`, or change the rights of this one."
    return RunFolderError(f"cannot write: {reason}.", where=where, remedy=remedy)


def _free(path: Path) -> str:
    try:
        return f"{free_bytes(path):,} bytes"
    except OSError:  # the disk that just failed may not answer this either
        return "an unknown number"
