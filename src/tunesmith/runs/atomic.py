"""Files and folders that are either complete or absent, whatever happens while they are written.

In: bytes, text or plain values, and the path that they belong at. Out: the file, on disk, under its name.
Must not know: what is written, torch.

A write goes to a `.tmp-` name beside the target, is fsynced, renamed over the target, and the folder is fsynced:
after a crash the old content or the new one is there, never a part.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tunesmith.errors import ResourceError, RunFolderError

TEMPORARY = ".tmp-"
"""Names that start like this are unfinished; the next start removes them."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_HASH_BLOCK_BYTES = 1 << 20


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what the disk says into the error that a person can act on: ResourceError (5) or RunFolderError (2)."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in _FULL:
            free = f"{free_bytes(path):,} bytes are free there"
            raise ResourceError(f"{reason}; {free}.", where=str(path), remedy="Make room, then run again.") from error
        if error.errno == errno.EIO:
            raise ResourceError(f"the disk failed: {reason}.", where=str(path)) from error
        remedy = "Choose another `runs_folder`, or change the rights of this one."
        raise RunFolderError(f"cannot write: {reason}.", where=str(path), remedy=remedy) from error


def free_bytes(path: Path) -> int:
    """Bytes that are free on the disk of `path`, or of its nearest existing parent."""
    folder = path
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def fsync_path(path: Path) -> None:
    """Flush a file's or a folder's content to the disk itself."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` at `path`: complete or not at all."""
    temporary = path.with_name(f"{TEMPORARY}{path.name}-{os.getpid()}")
    with disk_errors(path):
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fsync_path(path.parent)


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
def publish_folder(target: Path) -> Iterator[Path]:
    """A temporary folder to fill; when the block ends well it is fsynced and becomes `target` in one rename.

    A folder that is already at `target` is removed only when the new one is safe on disk. Anything that goes wrong
    removes the temporary folder and leaves `target` as it was.
    """
    temporary = target.with_name(f"{TEMPORARY}{target.name}-{os.getpid()}")
    with disk_errors(target):
        try:
            if temporary.exists():
                shutil.rmtree(temporary)
            temporary.mkdir(parents=True)
            yield temporary
            _fsync_tree(temporary)
            if target.exists():
                _remove_folder(target)
            temporary.rename(target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        fsync_path(target.parent)


def remove_folder(path: Path) -> None:
    """Remove a folder as one step: it vanishes under its name first, so that half of it is never met."""
    with disk_errors(path):
        _remove_folder(path)


def remove_temporaries(folder: Path) -> list[Path]:
    """Remove what an interrupted write left in `folder`; returns what was removed."""
    found = sorted(folder.glob(f"{TEMPORARY}*")) if folder.is_dir() else []
    with disk_errors(folder):
        for path in found:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
    return found


def _remove_folder(path: Path) -> None:
    doomed = path.with_name(f"{TEMPORARY}removed-{path.name}-{os.getpid()}")
    path.rename(doomed)
    shutil.rmtree(doomed)


def _fsync_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        fsync_path(path)
    fsync_path(folder)
