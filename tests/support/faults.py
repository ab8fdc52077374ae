"""A file layer that fails where it is told to: kills, errors and power cuts at every operation on files.

Python's own calls (`os.open`, `write`, `fsync`, `rename`, `unlink`, ...) are replaced while `installed` is active; only
what changes something under `root` counts as an operation. safetensors writes from Rust, past Python, so `save_file`
is replaced by the same bytes through Python, in pieces, with errors in the form in which Rust tells them.
"""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

PIECES = 3
"""Writes of one safetensors file in tests, so that a fault falls into the middle of it too."""
FILLING = frozenset({"create", "write", "fsync", "mkdir", "rename", "replace"})
"""Operations that a full disk refuses; what removes still works."""


class Died(BaseException):
    """The process is dead: nothing after it reaches the disk, clean-up included."""


@dataclass
class Faults:
    """What happens, and when. Operations count from 0; `at` None: nothing happens, operations are only counted.

    action: "kill" (SIGKILL to this very process), "die" (the same for the disk, in-process: every later operation is
    refused too), or an errno. after: the operation is done first. lasting: an errno comes at every later operation too.
    fsync inside `root` is counted and not done: these tests cut no power but modelled power.
    """

    root: Path
    at: int | None = None
    action: str | int = "die"
    after: bool = False
    lasting: bool = True
    log: list[str] = field(default_factory=list)
    watch: Callable[[str, tuple[Any, ...]], None] | None = None
    dead: bool = False

    def around(self, name: str, path: str, work: Callable[[], Any], *watched: Any) -> Any:
        """Do one operation, or what is to happen in its place."""
        number = len(self.log)
        self.log.append(f"{name} {os.path.relpath(path, self.root)}")
        if self.dead:
            raise Died
        due = self.at is not None and (number == self.at or (number > self.at and self.lasting))
        due = due and (self.action != errno.ENOSPC or name in FILLING)
        if due and not self.after:
            self._strike()
        result = work()
        if self.watch is not None:
            self.watch(name, (*watched, result))
        if due and self.after:
            self._strike()
        return result

    def _strike(self) -> None:
        if self.action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.action == "die":
            self.dead = True
            raise Died
        assert isinstance(self.action, int)
        raise OSError(self.action, os.strerror(self.action))


def _path_of(path: Any, dir_fd: int | None = None) -> str:
    """Absolute path of what a call names, relative to an open folder or not."""
    if isinstance(path, int):
        return str(Path(f"/proc/self/fd/{path}").readlink())
    base = Path.cwd() if dir_fd is None else Path(f"/proc/self/fd/{dir_fd}").readlink()
    return os.path.normpath(base / os.fspath(path))


@contextmanager
def installed(faults: Faults) -> Iterator[Faults]:
    """Replace Python's calls while the block runs."""
    root = str(faults.root.resolve())
    real = {name: getattr(os, name) for name in ("open", "write", "fsync", "ftruncate", "mkdir", "rmdir", "unlink")}
    real |= {name: getattr(os, name) for name in ("rename", "replace")}

    def ours(path: str) -> bool:
        return path == root or path.startswith(root + os.sep)

    def open_(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        work = lambda: real["open"](path, flags, mode, dir_fd=dir_fd)  # noqa: E731
        full = _path_of(path, dir_fd)
        if not ours(full) or not flags & (os.O_CREAT | os.O_TRUNC):
            return int(work())
        return int(faults.around("create", full, work, full, flags))

    def on_handle(name: str) -> Callable[..., Any]:
        def call(handle: int, *rest: Any) -> Any:
            full = _path_of(handle)
            if not ours(full):
                return real[name](handle, *rest)
            work = (lambda: None) if name == "fsync" else (lambda: real[name](handle, *rest))
            return faults.around(name, full, work, full, handle, *rest)

        return call

    def on_path(name: str) -> Callable[..., Any]:
        def call(path: Any, *rest: Any, dir_fd: int | None = None) -> Any:
            full = _path_of(path, dir_fd)
            if not ours(full):
                return real[name](path, *rest, dir_fd=dir_fd)
            return faults.around(name, full, lambda: real[name](path, *rest, dir_fd=dir_fd), full)

        return call

    def on_two(name: str) -> Callable[..., Any]:
        def call(old: Any, new: Any) -> Any:
            source, target = _path_of(old), _path_of(new)
            if not ours(source):
                return real[name](old, new)
            return faults.around(name, target, lambda: real[name](old, new), source, target)

        return call

    replaced: dict[str, Any] = {"open": open_}
    replaced |= {name: on_handle(name) for name in ("write", "fsync", "ftruncate")}
    replaced |= {name: on_path(name) for name in ("mkdir", "rmdir", "unlink")}
    replaced |= {name: on_two(name) for name in ("rename", "replace")}
    patches = [mock.patch.object(os, name, call) for name, call in replaced.items()]
    patches.append(mock.patch("tunesmith.train.checkpoint.save_file", save_in_pieces))
    for patch in patches:
        patch.start()
    try:
        yield faults
    finally:
        for patch in reversed(patches):
            patch.stop()


def save_in_pieces(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """What `safetensors.torch.save_file` writes, in pieces through Python; errors as Rust words them."""
    data = save(dict(tensors), None if metadata is None else dict(metadata))
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            piece = -(-len(data) // PIECES)
            for start in range(0, len(data), piece):
                os.write(handle, data[start : start + piece])
        finally:
            os.close(handle)
    except OSError as error:
        raise SafetensorError(
            f"Error while serializing: I/O error: {error.strerror} (os error {error.errno})"
        ) from None


ERRORS = (errno.ENOSPC, errno.EIO, errno.ESTALE, errno.EROFS)
