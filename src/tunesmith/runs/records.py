"""Records of a run: JSON lines, one object a line, in the order of the steps.

In: plain records with a `step`. Out: the file, and the records again. Must not know: what a record means, torch.

A process that dies while it appends can leave a torn last line; readers leave it out, and a resumed run cuts it off.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

from tunesmith.errors import RunFolderError
from tunesmith.runs.atomic import disk_errors, fsync_path, write_bytes

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
    with disk_errors(path):
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            line = encode_record(record)
            while line:  # a full disk can take a part
                line = line[os.write(handle, line) :]
        finally:
            os.close(handle)


def sync_records(path: Path) -> None:
    """Flush the file to the disk itself; called before a checkpoint that counts on its records is published."""
    with disk_errors(path):
        if path.exists():
            fsync_path(path)


def read_records(path: Path) -> list[Record]:
    """Every whole record; no file gives no records. Raises RunFolderError where a line before the last is not JSON."""
    return [record for record, _ in _read_lines(path)]


def truncate_records(path: Path, after_step: int) -> list[Record]:
    """Cut off the records after `after_step` and a torn last line; returns the records that stay."""
    lines = _read_lines(path)
    kept = [(record, line) for record, line in lines if _step_of(record, path) <= after_step]
    data = b"".join(line for _, line in kept)
    if path.exists() and path.stat().st_size != len(data):
        write_bytes(path, data)
    return [record for record, _ in kept]


def _step_of(record: Record, path: Path) -> int:
    step = record.get("step")
    if not isinstance(step, int):
        raise RunFolderError("a record has no step.", where=str(path), remedy="Move the run folder away and run again.")
    return step


def _read_lines(path: Path) -> list[tuple[Record, bytes]]:
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    found: list[tuple[Record, bytes]] = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict) and line.endswith(b"\n"):
            found.append((record, line))
        elif number < len(lines):
            remedy = "Move the run folder away and run again."
            raise RunFolderError("not a JSON object.", where=f"{path}:{number}", remedy=remedy)
    return found
