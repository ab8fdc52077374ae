"""The log of a run: what was said and what went wrong, one JSON object an event, beside the metrics.

In: events. Out: log.jsonl in the run folder; the older events in log.1.jsonl and so on, up to a number of files.
Must not know: training, what an event means, torch.

Secrets are left out of every event. A log that cannot be written stops nothing: it says so once, and tries again with
the next event.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from tunesmith.redact import redact

NAME = "log.jsonl"
MAX_BYTES = 4 * 2**20
"""A file of this size is put aside: about twenty thousand events."""
KEPT = 3
"""Files put aside; the oldest is removed."""
MAX_TEXT = 20_000
"""Characters of one text: a traceback of hundreds of frames. Of a longer one the beginning and the end are kept."""

Level = Literal["info", "warning", "error"]
Detail = None | bool | int | float | str


class RunLog:
    """Appends events to `folder/log.jsonl`; nothing that happens to the disk raises."""

    def __init__(self, folder: Path, *, max_bytes: int = MAX_BYTES, kept: int = KEPT) -> None:
        self._path = folder / NAME
        self._max_bytes = max_bytes
        self._kept = kept
        self._torn = _is_torn(self._path)
        self._failed = False

    def write(
        self, level: Level, text: str, *, at: float | None = None, details: Mapping[str, Detail] | None = None
    ) -> str:
        """Append one event. `at` is its time (seconds since 1970, UTC) if not now. Returns why the log cannot be
        written, the first time that it cannot; else nothing."""
        line = encode_event(level, text, at=time.time() if at is None else at, details=details or {})
        try:
            self._append(line)
        except OSError as error:
            before, self._failed = self._failed, True
            return "" if before else f"{self._path} cannot be written: {error.strerror or error}"
        self._failed = False
        return ""

    def _append(self, line: bytes) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK  # no link, no waiting for a pipe
        handle = os.open(self._path, flags, 0o600)
        try:
            size = os.fstat(handle).st_size
            if size and size + len(line) > self._max_bytes:
                os.close(handle)
                handle = -1
                self._rotate()
                handle = os.open(self._path, flags, 0o600)
            data = b"\n" + line if self._torn else line
            self._torn = True
            while data:  # a full disk can take a part
                data = data[os.write(handle, data) :]
            self._torn = False
        finally:
            if handle >= 0:
                os.close(handle)

    def _rotate(self) -> None:
        """log.jsonl becomes log.1.jsonl, that log.2.jsonl; a rename takes the place of the oldest."""
        self._torn = False
        names = [self._path, *(self._path.with_name(f"log.{number}.jsonl") for number in range(1, self._kept + 1))]
        for older, newer in zip(reversed(names[1:]), reversed(names[:-1]), strict=True):
            if newer.exists():
                newer.replace(older)


def encode_event(level: Level, text: str, *, at: float, details: Mapping[str, Detail]) -> bytes:
    """One line: UTC time to the millisecond, level, the details, the text; without secrets."""
    stamp = datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"
    clean = {key: redact(value) if isinstance(value, str) else value for key, value in details.items()}
    event = {"time": stamp, "level": level, **clean, "text": _cut(redact(text))}
    return json.dumps(event, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def _cut(text: str) -> str:
    if len(text) <= MAX_TEXT:
        return text
    half = MAX_TEXT // 2
    return f"{text[:half]}\n[{len(text) - 2 * half:,} characters left out]\n{text[-half:]}"


def _is_torn(path: Path) -> bool:
    """Whether the last event was not written to its end, so that the next must begin on a line of its own."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        size = os.fstat(handle).st_size
        return size > 0 and os.pread(handle, 1, size - 1) != b"\n"
    except OSError:
        return False
    finally:
        os.close(handle)
