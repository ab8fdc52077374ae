"""Records of a run: JSON lines, one object a line, in the order of the steps.

In: plain records with a `step`. Out: the file, and the records again. Must not know: what a record means, torch.

A process that dies while it appends can leave a torn last line; readers leave it out, and a resumed run cuts it off.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from tunesmith.errors import RunFolderError, TunesmithError
from tunesmith.runs.atomic import append_bytes, fsync_path, write_bytes
from tunesmith.runs.disk import PASSING, disk_errors, patiently

Value = None | bool | int | float | str | list[str]
Record = dict[str, Value]


def encode_record(record: Mapping[str, Value]) -> bytes:
    """The line of `record`: keys as given, floats exactly, nan and infinity as null (JSON has neither)."""
    clean = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()
    }
    return json.dumps(clean, ensure_ascii=False, allow_nan=False).encode("utf-8") + b"\n"


def append_record(path: Path, record: Mapping[str, Value]) -> None:
    """Add one line at the end of the file, in one write. `sync_records` makes it durable."""
    append_bytes(path, encode_record(record))


def sync_records(path: Path) -> None:
    """Flush the file to the disk itself; called before a checkpoint that counts on its records is published."""
    patiently(lambda: _sync(path))


def _sync(path: Path) -> None:
    with disk_errors(path):
        if not path.exists():
            return
        try:
            fsync_path(path)
            fsync_path(path.parent)  # the first time, the name itself
        except OSError as error:
            if error.errno in PASSING:  # a second fsync may be a success that wrote nothing: write all of it again
                write_bytes(path, path.read_bytes())
            raise


class Records:
    """Records of a stage that trains: what a failing disk does not take waits in memory, in its order.

    So the step that was taken is not lost: the loop saves when `behind`, and the save flushes or says what failed.
    """

    def __init__(self) -> None:
        self._waiting: dict[Path, list[bytes]] = {}

    @property
    def behind(self) -> bool:
        """Whether anything waits."""
        return bool(self._waiting)

    def append(self, path: Path, record: Mapping[str, Value]) -> None:
        """Add one record; a disk that fails is no error here, but it is in `flush`."""
        line = encode_record(record)
        if path in self._waiting:
            self._waiting[path].append(line)
            return
        try:
            append_bytes(path, line)
        except TunesmithError:
            self._waiting[path] = [line]

    def flush(self, *paths: Path) -> None:
        """Write what waits and make `paths` durable; raises ResourceError (5) or RunFolderError (2)."""
        for path, lines in list(self._waiting.items()):
            append_bytes(path, b"".join(lines))
            del self._waiting[path]
        for path in paths:
            sync_records(path)

    def content(self, path: Path) -> bytes:
        """The whole file as it should be: what the disk has, without a torn end, and what waits."""
        have = path.read_bytes() if path.exists() else b""
        return have[: have.rfind(b"\n") + 1] + self.waiting(path)

    def waiting(self, path: Path) -> bytes:
        """What of the file waits in memory."""
        return b"".join(self._waiting.get(path, []))


def read_records(path: Path) -> list[Record]:
    """Every whole record; no file gives no records. Raises RunFolderError where a line before the last is not JSON."""
    lines = _lines(path)
    if lines and lines[-1][0] is None:
        lines = lines[:-1]
    return [_whole(record, path, number) for number, (record, _) in enumerate(lines, start=1)]


def truncate_records(path: Path, after_step: int) -> list[Record]:
    """Cut off the records after `after_step`, and whatever a crash made of them; returns the records that stay.

    What was written after the last sync may come back as anything: a torn line, zeros, a later line without an earlier
    one. Raises RunFolderError, and cuts nothing, where a line is damaged and a record that must stay follows it.
    """
    lines = _lines(path)
    num_kept = 0
    for number, (record, _) in enumerate(lines, start=1):
        if record is not None and _step_of(record, path) <= after_step:
            num_kept = number
    kept = [(_whole(record, path, number), line) for number, (record, line) in enumerate(lines[:num_kept], start=1)]
    data = b"".join(line for _, line in kept)
    if path.exists() and path.stat().st_size != len(data):
        write_bytes(path, data)
    return [record for record, _ in kept]


def _step_of(record: Record, path: Path) -> int:
    step = record.get("step")
    if not isinstance(step, int):
        raise RunFolderError("a record has no step.", where=str(path), remedy="Move the run folder away and run again.")
    return step


def _whole(record: Record | None, path: Path, number: int) -> Record:
    if record is None:
        remedy = "Restore the file from a copy, or move the run folder away and run again."
        raise RunFolderError("not a JSON object.", where=f"{path}:{number}", remedy=remedy)
    return record


def _lines(path: Path) -> list[tuple[Record | None, bytes]]:
    """Every line with its record; None where it is none, or is torn."""
    if not path.exists():
        return []
    with disk_errors(path):
        lines = path.read_bytes().splitlines(keepends=True)
    return [(_decoded(line), line) for line in lines]


def _decoded(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and line.endswith(b"\n") else None
