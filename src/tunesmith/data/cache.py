"""Prepared rows on disk, known by everything that they depend on.

In: a key's parts. Out: a folder that is complete, shared by all runs, or a place to make one.
Must not know: what is in the folder beyond its manifest, trees, recipes.
"""

from __future__ import annotations

import atexit
import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TypedDict, cast

from tunesmith.runs.atomic import TEMPORARY, fsync_path, remove_folder, sha256_file, write_json
from tunesmith.runs.bounded import read_json
from tunesmith.runs.disk import disk_errors

MANIFEST = "manifest.json"
MANIFEST_BYTES = 64 * 2**20
HASHED_BYTES = 256 * 2**20
"""Files up to this size are hashed each time that an entry is opened (a fifth of a second); of larger ones the size
is checked."""
KEPT_DAYS = 60
"""An entry that no run has opened for so long is removed when another is made."""
ABANDONED_DAYS = 2  # a temporary folder as old as this belongs to no living process
UNFINISHED_DAYS = 14  # results of chunks wait so long for the start that goes on with them
UNLOCKED_SECONDS = 5  # a temporary folder younger than this may not have its lock yet
_UNFINISHED = "-chunks"


class Manifest(TypedDict):
    """The last file of an entry: names, sizes and hashes of the others, and what their maker wants to know again."""

    files: dict[str, list[int | str]]
    content: dict[str, object]


def default_cache_folder() -> Path:
    """`tunesmith/prepared` in the user's cache folder."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "tunesmith" / "prepared"


@cache
def code_sha() -> str:
    """sha256 of the source of this package: other code may render otherwise, so its results are not shared."""
    digest = hashlib.sha256()
    folder = Path(__file__).parent
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def cache_key(parts: Mapping[str, object]) -> str:
    """sha256 of the parts as canonical JSON, with the code's own hash."""
    text = json.dumps({**parts, "code": code_sha()}, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def unfinished_folder(root: Path, key: str) -> Path:
    """Where the maker of an entry may leave work for a later start; it goes when the entry is published."""
    return root / f"{TEMPORARY}{key}{_UNFINISHED}"


def cached(
    key: str,
    make: Callable[[Path], Mapping[str, object]],
    *,
    root: Path,
    tell: Callable[[str], None] = lambda text: None,
) -> tuple[Path, dict[str, object]]:
    """The entry's folder and content: as it lies there where it is whole, else made by `make` in a fresh folder.

    `make` fills the folder, which lies in the cache folder, and returns the content. Publication is one rename:
    another process sees all or nothing, and of two that make one entry the second takes what the first published.
    A damaged entry is made again, and `tell` is told.
    """
    root = _writable(root)
    folder = root / key
    content = read_entry(folder)
    if content is not None:
        os.utime(folder / MANIFEST)
        return folder, content
    if folder.exists():
        tell(f"the prepared rows in {folder} are damaged: they are prepared again")
        remove_folder(folder)
    _clean(root)
    with disk_errors(folder):
        content = _made(folder, make)
    shutil.rmtree(unfinished_folder(root, key), ignore_errors=True)
    return folder, content


def _made(folder: Path, make: Callable[[Path], Mapping[str, object]]) -> dict[str, object]:
    """Make the entry beside its place, then move it there. What fails leaves nothing."""
    temporary = Path(tempfile.mkdtemp(prefix=f"{TEMPORARY}{folder.name}-", dir=folder.parent))
    lock = os.open(temporary, os.O_RDONLY)
    try:
        _try_lock(lock)  # held for as long as this process lives: who can take it knows that the folder is abandoned
        content = dict(make(temporary))
        files = {path.relative_to(temporary).as_posix(): path for path in temporary.rglob("*") if path.is_file()}
        accounts = {name: [path.stat().st_size, sha256_file(path)] for name, path in sorted(files.items())}
        write_json(temporary / MANIFEST, {"files": accounts, "content": content})
        for path in (*sorted(temporary.rglob("*")), temporary):
            fsync_path(path)
        content = _publish(temporary, folder, content)
        fsync_path(folder.parent)
        return content
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # where it was published, nothing is here any more
        os.close(lock)


def _publish(temporary: Path, folder: Path, content: dict[str, object]) -> dict[str, object]:
    """Move the folder to its place, unless a whole entry has come there meanwhile; returns the content there."""
    try:
        temporary.rename(folder)
        return content
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    theirs = read_entry(folder)
    if theirs is not None:
        return theirs
    remove_folder(folder)
    temporary.rename(folder)
    return content


def _try_lock(handle: int) -> bool:
    """Whether this process has the lock now; False where another has it, or the disk knows no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def read_entry(folder: Path) -> dict[str, object] | None:
    """The content of a whole entry; None where it is absent, unfinished or damaged."""
    try:
        manifest = cast("Manifest", read_json(folder / MANIFEST, max_bytes=MANIFEST_BYTES))
        for name, (size, sha) in manifest["files"].items():
            path = folder / name
            if path.stat().st_size != size or (int(size) <= HASHED_BYTES and sha256_file(path) != sha):
                return None
        return manifest["content"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _writable(root: Path) -> Path:
    """The cache folder, made for its owner alone; one of this process where it cannot be written (a read-only home)."""
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        root.mkdir(mode=0o700, exist_ok=True)
    except OSError:
        return _own_folder()
    return root if os.access(root, os.W_OK) else _own_folder()


@cache
def _own_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="tunesmith-prepared-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _clean(root: Path) -> None:
    """Entries that nobody has used for long, and what dead processes left behind."""
    now = time.time()
    for path in root.iterdir():
        try:
            is_temporary = path.name.startswith(TEMPORARY)
            stamp = path if is_temporary or not (path / MANIFEST).exists() else path / MANIFEST
            age_seconds = now - stamp.stat().st_mtime
            if age_seconds > _kept_days(path.name) * 86400 or (
                is_temporary and age_seconds > UNLOCKED_SECONDS and _is_abandoned(path)
            ):
                shutil.rmtree(path)
        except OSError:
            continue  # another process was faster


def _kept_days(name: str) -> int:
    if not name.startswith(TEMPORARY):
        return KEPT_DAYS
    return UNFINISHED_DAYS if name.endswith(_UNFINISHED) else ABANDONED_DAYS


def _is_abandoned(path: Path) -> bool:
    """Whether nobody makes the entry in this folder any more: its maker's lock is free."""
    if path.name.endswith(_UNFINISHED):
        return False
    handle = os.open(path, os.O_RDONLY)
    try:
        return _try_lock(handle)
    finally:
        os.close(handle)
