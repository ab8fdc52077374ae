"""Prepared rows on disk, known by everything that they depend on.

In: a key's parts. Out: a folder that is complete, shared by all runs, or a place to make one.
Must not know: what is in the folder beyond its manifest, trees, recipes.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TypedDict

from tunesmith.runs.atomic import TEMPORARY, publish_folder, remove_folder, sha256_file, write_json

MANIFEST = "manifest.json"
HASHED_BYTES = 256 * 2**20
"""Files up to this size are hashed each time that an entry is opened (a fifth of a second); of larger ones the size
is checked."""
KEPT_DAYS = 60
"""An entry that no run has opened for so long is removed when another is made."""
ABANDONED_DAYS = 2  # a temporary folder as old as this belongs to no living process


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


def cached(key: str, make: Callable[[Path], Mapping[str, object]], *, root: Path) -> tuple[Path, dict[str, object]]:
    """The entry's folder and content: as it lies there where it is whole, else made by `make` in a fresh folder.

    `make` fills the folder and returns the content. Publication is one rename: another process sees all or nothing.
    A damaged entry is made again.
    """
    root = _writable(root)
    folder = root / key
    content = read_entry(folder)
    if content is not None:
        os.utime(folder / MANIFEST)
        return folder, content
    if folder.exists():
        remove_folder(folder)
    _clean(root)
    with publish_folder(folder) as temporary:
        content = dict(make(temporary))
        files = {path.relative_to(temporary).as_posix(): path for path in temporary.rglob("*") if path.is_file()}
        write_json(
            temporary / MANIFEST,
            {
                "files": {name: [path.stat().st_size, sha256_file(path)] for name, path in sorted(files.items())},
                "content": content,
            },
        )
    return folder, content


def read_entry(folder: Path) -> dict[str, object] | None:
    """The content of a whole entry; None where it is absent, unfinished or damaged."""
    try:
        manifest: Manifest = json.loads((folder / MANIFEST).read_bytes())
        for name, (size, sha) in manifest["files"].items():
            path = folder / name
            if path.stat().st_size != size or (int(size) <= HASHED_BYTES and sha256_file(path) != sha):
                return None
        return manifest["content"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _writable(root: Path) -> Path:
    """The cache folder; a folder of this process alone where it cannot be written (a read-only home)."""
    try:
        root.mkdir(parents=True, exist_ok=True)
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
            age_days = (now - stamp.stat().st_mtime) / 86400
            if age_days > (ABANDONED_DAYS if is_temporary else KEPT_DAYS):
                shutil.rmtree(path)
        except OSError:
            continue  # another process was faster
