"""What a disk may hold after the power went: everything that was fsynced, and any part of the rest.

In: the operations of a process on a folder, as `tests.support.faults` sees them. Out: folders as the next start may
find them. The model is stricter than any journaling file system: of a file's bytes only those at its last fsync are
sure; of a folder's entries (creation, rename, unlink) only those before the folder's last fsync; the rest is there or
not, one by one, in any order, except that two changes of one name keep theirs.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Entry = tuple["Folder", str, "Node | None"]
"""A name in a folder gets a node, or (None) goes."""


@dataclass(eq=False)
class File:
    """Bytes as the process sees them, and as they were at the last fsync."""

    data: bytes = b""
    synced: bytes = b""


@dataclass(eq=False)
class Folder:
    """Names as the process sees them, and as they were at the last fsync."""

    names: dict[str, File | Folder] = field(default_factory=dict)
    synced: dict[str, File | Folder] = field(default_factory=dict)


Node = File | Folder


class Disk:
    """Follows the operations under `root`, whose content at the start is on the disk already."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.top = _read(self.root)
        self.pending: list[tuple[Entry, ...]] = []
        self._written: dict[int, File] = {}

    def watch(self, name: str, given: tuple[Any, ...]) -> None:
        """One operation that was done; `given` is what `Faults.around` was told, and the call's result."""
        path = str(given[0])
        if name in ("rename", "replace"):
            self._rename(path, str(given[1]))
        elif name in ("unlink", "rmdir"):
            self._change((*self._at(path), None))
        elif name == "mkdir":
            self._change((*self._at(path), Folder()))
        elif name == "create":
            self._create(path, flags=int(given[1]))
        elif name == "write":
            file = self._file(path)
            file.data += bytes(given[2])[: int(given[-1])]
        elif name == "ftruncate":
            file = self._file(path)
            file.data = file.data[: int(given[2])]
        elif name == "fsync":
            self._fsync(path)

    def outcomes(self, draw: random.Random, num_random: int) -> Iterator[Folder]:
        """Disks that a power cut now may leave: nothing pending done, all of it, and some of it."""
        yield self._after([], draw, torn="synced")
        yield self._after(self.pending, draw, torn="synced")  # names are there, bytes are not
        yield self._after(self.pending, draw, torn="all")
        for _ in range(num_random):
            yield self._after([each for each in self.pending if draw.random() < 0.5], draw, torn="any")

    def _after(self, done: list[tuple[Entry, ...]], draw: random.Random, *, torn: str) -> Folder:
        made: dict[int, dict[str, Node]] = {}
        for change in done:
            for folder, name, node in change:
                names = made.setdefault(id(folder), dict(folder.synced))
                if node is None:
                    names.pop(name, None)
                else:
                    names[name] = node

        def copy(folder: Folder) -> Folder:
            names = made.get(id(folder), folder.synced)
            copies: dict[str, Node] = {
                name: copy(node) if isinstance(node, Folder) else _torn(node, draw, torn)
                for name, node in names.items()
            }
            return Folder(copies, copies)

        return copy(self.top)

    def _at(self, path: str) -> tuple[Folder, str]:
        *parents, name = Path(path).relative_to(self.root).parts
        folder = self.top
        for parent in parents:
            inner = folder.names[parent]
            assert isinstance(inner, Folder)
            folder = inner
        return folder, name

    def _file(self, path: str) -> File:
        folder, name = self._at(path)
        file = folder.names[name]
        assert isinstance(file, File)
        return file

    def _create(self, path: str, *, flags: int) -> None:
        folder, name = self._at(path)
        if name not in folder.names:
            self._change((folder, name, File()))
        elif flags & os.O_TRUNC:
            self._file(path).data = b""

    def _rename(self, source: str, target: str) -> None:
        folder, name = self._at(source)
        self._change((*self._at(target), folder.names[name]), (folder, name, None))

    def _change(self, *entries: Entry) -> None:
        self.pending.append(entries)
        for folder, name, node in entries:
            if node is None:
                del folder.names[name]
            else:
                folder.names[name] = node

    def _fsync(self, path: str) -> None:
        node: Node = self.top
        if path != str(self.root):
            folder, name = self._at(path)
            node = folder.names[name]
        if isinstance(node, File):
            node.synced = node.data
            return
        commits = [each for each in self.pending if any(folder is node for folder, _, _ in each)]
        self.pending = [each for each in self.pending if each not in commits]
        for change in commits:
            for folder, name, entry in change:
                if entry is None:
                    folder.synced.pop(name, None)
                else:
                    folder.synced[name] = entry


def write(folder: Folder, path: Path) -> None:
    """The folder as real files."""
    path.mkdir(mode=0o700)
    for name, node in folder.names.items():
        if isinstance(node, Folder):
            write(node, path / name)
        else:
            (path / name).write_bytes(node.data)


def key_of(folder: Folder) -> str:
    """The same for two disks that hold the same."""
    parts = [
        f"{name}/{key_of(node)}" if isinstance(node, Folder) else f"{name}={hashlib.sha256(node.data).hexdigest()}"
        for name, node in sorted(folder.names.items())
    ]
    return f"({';'.join(parts)})"


def _torn(file: File, draw: random.Random, torn: str) -> File:
    """What is left of a file: as synced, as written, or its new part cut off, zeroed, or torn."""
    if torn == "synced" or file.data == file.synced:
        return File(file.synced)
    if torn == "all":
        return File(file.data)
    cut = draw.randint(0, len(file.data))
    kinds = [file.synced, file.data, file.data[:cut], file.data[:cut] + bytes(len(file.data) - cut), b""]
    if file.data.startswith(file.synced):  # appended: what was there stays
        new = file.data[len(file.synced) :]
        cut = draw.randint(0, len(new))
        kinds = [file.synced + part for part in (b"", new, new[:cut], new[:cut] + bytes(len(new) - cut))]
        kinds.append(file.synced + bytes(cut) + new[cut:])
    return File(draw.choice(kinds))


def _read(path: Path) -> Folder:
    names: dict[str, Node] = {}
    for each in path.iterdir():
        data = b"" if each.is_dir() else each.read_bytes()
        names[each.name] = _read(each) if each.is_dir() else File(data, data)
    return Folder(names, dict(names))
