"""Files and folders that are either complete or absent, whatever happens while they are written.

In: bytes, text or plain values, and the path that they belong at. Out: the file, on disk, under its name.
Must not know: what is written, torch.

A write goes to a `.tmp-` name beside the target, is fsynced, renamed over the target, and the folder is fsynced:
after a crash the old content or the new one is there, never a part. Files get mode 0600 and folders 0700, whatever the
umask; a symbolic link at the target or at the temporary name is replaced, never followed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from tunesmith.runs.clock import start_ticks
from tunesmith.runs.disk import disk_errors, patiently

TEMPORARY = ".tmp-"
"""Names that start like this are unfinished; the next start removes them."""
_REPLACED = f"{TEMPORARY}replaced-"
"""A whole folder that is out of the way for the instant between two renames; a start that finds it puts it back."""

_HASH_BLOCK_BYTES = 1 << 20
_FILE_MODE, _FOLDER_MODE = 0o600, 0o700
_CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP)
"""Some network and user-space file systems refuse fsync on a folder; they order renames by themselves."""


def make_folder(path: Path) -> None:
    """Make `path` (mode 0700) and its parents, each entry fsynced; what exists stays as it is."""
    if path.is_dir():
        return
    if path.parent != path:
        make_folder(path.parent)
    path.mkdir(mode=_FOLDER_MODE, exist_ok=True)  # another process may have been faster
    fsync_path(path.parent)


def fsync_path(path: Path) -> None:
    """Flush a file's or a folder's content to the disk itself."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC or not path.is_dir():
            raise
    finally:
        os.close(handle)


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` at `path`: complete or not at all."""
    patiently(lambda: _write_bytes(path, data))


def _write_bytes(path: Path, data: bytes) -> None:
    temporary = path.with_name(f"{TEMPORARY}{path.name}-{os.getpid()}")
    with disk_errors(path, need_bytes=len(data)):
        try:
            handle = _create(temporary)
            try:
                _write_all(handle, data)
                os.fsync(handle)
            finally:
                os.close(handle)
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        fsync_path(path.parent)


def private_file(path: Path) -> BinaryIO:
    """A new file to be written at `path`, mode 0600; what was there, a link too, is removed first."""
    return os.fdopen(_create(path), "wb")


def _create(path: Path) -> int:
    path.unlink(missing_ok=True)  # left by a process that had our number, or planted there
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, _FILE_MODE)


def append_bytes(path: Path, line: bytes) -> None:
    """Add one line at the end of a file, in one write; a part of a line that an earlier append left is cut off."""
    patiently(lambda: _append_bytes(path, line))


def _append_bytes(path: Path, line: bytes) -> None:
    with disk_errors(path, need_bytes=len(line)):
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        handle = os.open(path, flags, _FILE_MODE)
        try:
            _write_or_cut(handle, line, size=_cut_torn_line(handle))
        finally:
            os.close(handle)


def _write_or_cut(handle: int, line: bytes, *, size: int) -> None:
    try:
        _write_all(handle, line)
    except OSError:
        with suppress(OSError):
            os.ftruncate(handle, size)
        raise


def _cut_torn_line(handle: int) -> int:
    """The file's size, after what follows its last end of line was cut off."""
    size = end = os.fstat(handle).st_size
    while end > 0 and os.pread(handle, 1, end - 1) != b"\n":
        end -= 1
    if end < size:
        os.ftruncate(handle, end)
    return end


def _write_all(handle: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:  # a disk that is nearly full takes a part
        rest = rest[os.write(handle, rest) :]


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 at `path`: complete or not at all."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Mapping[str, object]) -> None:
    """Write `value` as indented JSON at `path`; NaN and infinity are refused, because they are not JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def sha256_file(path: Path) -> str:
    """Hash of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def publish_folder(target: Path, *, need_bytes: int | None = None) -> Iterator[Path]:
    """A temporary folder to fill; when the block ends well it is fsynced and becomes `target` in one rename.

    A folder that is already at `target` is removed only when the new one is safe on disk. Anything that goes wrong
    removes the temporary folder and leaves `target` as it was. need_bytes: what the error of a full disk says.
    """
    temporary = target.with_name(f"{TEMPORARY}{target.name}-{os.getpid()}")
    replaced = target.with_name(f"{_REPLACED}{os.getpid()}-{target.name}")
    with disk_errors(target, need_bytes=need_bytes):
        try:
            _remove_anything(temporary)
            make_folder(target.parent)
            temporary.mkdir(mode=_FOLDER_MODE)
            yield temporary
            _secure_tree(temporary)
            if os.path.lexists(target):
                _remove_anything(replaced)
                target.rename(replaced)
            temporary.rename(target)
        except BaseException:
            with suppress(OSError):
                _put_back(replaced, target)
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        fsync_path(target.parent)
        _remove_anything(replaced)


def remove_file(path: Path) -> None:
    """Remove a file, durably; one that is not there is no error."""
    with disk_errors(path):
        if os.path.lexists(path):
            path.unlink()
            fsync_path(path.parent)


def remove_folder(path: Path) -> None:
    """Remove a folder as one step: it vanishes under its name first, so that half of it is never met."""
    patiently(lambda: _remove_folder(path))


def _remove_folder(path: Path) -> None:
    doomed = path.with_name(f"{TEMPORARY}removed-{path.name}-{os.getpid()}")
    with disk_errors(path):
        if os.path.lexists(path):  # else an attempt before this one got so far
            _remove_anything(doomed)
            path.rename(doomed)
            fsync_path(path.parent)  # else a power cut could leave the old name on a folder with files missing
        _remove_anything(doomed)


def remove_temporaries(folder: Path, *, spare_living: bool = False) -> list[Path]:
    """Remove what an interrupted write left in `folder`; returns what was removed.

    `spare_living`: for a folder in which others may write beside its owner, leave what a living process began.
    """
    found = sorted(folder.glob(f"{TEMPORARY}*")) if folder.is_dir() else []
    if spare_living:
        found = [path for path in found if not _is_being_written(path)]
    with disk_errors(folder):
        for path in found:
            if path.name.startswith(_REPLACED):
                _put_back(path, path.with_name(path.name.removeprefix(_REPLACED).partition("-")[2]))
            _remove_anything(path)
    return found


def _is_being_written(path: Path) -> bool:
    """Whether another process that still lives began it (or one that was given its number since)."""
    pid = path.name.rpartition("-")[2]
    return pid.isdigit() and int(pid) != os.getpid() and start_ticks(int(pid)) is not None


def _put_back(replaced: Path, target: Path) -> None:
    if os.path.lexists(replaced) and not os.path.lexists(target):
        replaced.rename(target)


def _remove_anything(path: Path) -> None:
    """A folder with all that is in it, a file, or a link itself; or nothing, where nothing is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()


def _secure_tree(folder: Path) -> None:
    """Every file and folder private, and on the disk itself. What libraries wrote there has the umask's modes."""
    for path in [*sorted(folder.rglob("*")), folder]:
        if not path.is_symlink():
            path.chmod(_FOLDER_MODE if path.is_dir() else _FILE_MODE)
            fsync_path(path)
