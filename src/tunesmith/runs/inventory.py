"""What lies in a folder, by name, size and sha256, and whether it is still exactly that.

In: a folder. Out: an inventory that a manifest keeps; later what is wrong, naming the file. Must not know: what the
files hold, torch.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from tunesmith.runs.atomic import sha256_file
from tunesmith.runs.bounded import read_json

Inventory = dict[str, dict[str, object]]
"""Of every file its `bytes` and `sha256`, by its path in the folder, with `/` between names."""

_NOT_OURS = frozenset({".DS_Store", "Thumbs.db", "desktop.ini", ".gitattributes", "README.md"})
_NETWORK_LEFTOVER = ".nfs"
"""What file systems, desktops and people put beside our files, and no program of ours reads."""

_LARGEST_JSON_BYTES = 16 << 20


def take_inventory(folder: Path) -> Inventory:
    """Every file below `folder`, but those that no program reads; in the alphabet's order."""
    return {name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)} for name, path in sorted(_files(folder))}


def read_inventory(value: object) -> Inventory:
    """`value` as it was read from JSON. Raises ValueError where it is none, or a name leads out of the folder."""
    if not isinstance(value, dict):
        raise ValueError("no files are named")
    for name, entry in value.items():
        if not isinstance(entry, dict) or entry.keys() != {"bytes", "sha256"}:
            raise ValueError(f"{name!r} has no size and hash")
        if type(entry["bytes"]) is not int or not isinstance(entry["sha256"], str):
            raise ValueError(f"{name!r} has no size and hash")
        if any(part in ("", ".", "..") for part in name.split("/")) or "\\" in name or "\0" in name:
            raise ValueError(f"{name!r} is no name of a file in a folder")
    return value


def digest(value: Mapping[str, object]) -> str:
    """sha256 of a JSON object, so that a file can say what it itself is: an altered size is no altered file."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def find_change(folder: Path, inventory: Mapping[str, Mapping[str, object]], *, beside: frozenset[str]) -> str:
    """How the files in `folder` differ from the inventory, naming the first; empty where every byte is as it was.

    `beside`: names that may lie there without being in it.
    """
    try:
        if folder.is_symlink():
            return "is a symbolic link"
        for name, entry in inventory.items():
            problem = _change_of(folder / name, entry)
            if problem:
                return f"{name} {problem}"
        extra = sorted({name for name, _ in _files(folder)} - inventory.keys() - beside)
    except OSError as error:
        return f"{Path(str(error.filename)).name} cannot be read: {error.strerror}"
    return f"{extra[0]} was added: it is not one of the files that were written" if extra else ""


def read_object(path: Path) -> dict[str, object]:
    """A JSON object from a file of at most 16 MiB that is no link. Raises OSError, or ValueError where it is none."""
    if path.is_symlink():
        raise ValueError("is a symbolic link")
    try:
        value = read_json(path, max_bytes=_LARGEST_JSON_BYTES)
    except ValueError as problem:
        raise ValueError(str(problem).removeprefix("it ")) from problem  # the file is named before it here
    if not isinstance(value, dict):
        raise ValueError("is not a JSON object")
    return dict(value)


def _change_of(path: Path, entry: Mapping[str, object]) -> str:
    if path.is_symlink():
        return "is a symbolic link"
    if not path.is_file():
        return "is missing"
    size = path.stat().st_size
    if size != entry["bytes"]:
        return f"has {size:,} bytes, not {entry['bytes']:,}"
    return "" if sha256_file(path) == entry["sha256"] else "was altered: its sha256 is not the one that was written"


def _files(folder: Path) -> list[tuple[str, Path]]:
    """Names and paths of all files and links; a link to a folder is not followed."""
    found = []
    for root, folders, names in os.walk(folder):
        links = [name for name in folders if (Path(root) / name).is_symlink()]
        for name in (*names, *links):
            if name not in _NOT_OURS and not name.startswith(_NETWORK_LEFTOVER):
                path = Path(root) / name
                found.append((path.relative_to(folder).as_posix(), path))
    return found
