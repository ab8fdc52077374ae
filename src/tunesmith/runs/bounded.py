"""JSON files that came from somewhere else, or may have been altered: read within limits of size and depth.

In: a path. Out: plain values. Raises ValueError, which says what is wrong with the content, or OSError.
Must not know: what the values mean.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path

MAX_BYTES = 8 * 2**20
"""Manifests and configurations have a few kilobytes; a tokenizer's with thousands of added tokens a megabyte."""
MAX_DEPTH = 64
"""The deepest configuration that is known has 8 levels."""

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]


def read_bytes(path: Path, *, max_bytes: int = MAX_BYTES) -> bytes:
    """The content of a regular file of at most `max_bytes`; a pipe or device is never waited for."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise ValueError("it is no regular file")
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise ValueError(f"it has more than {max_bytes:,} bytes")
    return data


def read_json(path: Path, *, max_bytes: int = MAX_BYTES, max_depth: int = MAX_DEPTH) -> Json:
    """The value in a JSON file."""
    return parse_json(read_bytes(path, max_bytes=max_bytes), max_depth=max_depth)


def parse_json(data: bytes, *, max_depth: int = MAX_DEPTH) -> Json:
    """The value of a JSON text, UTF-8 with or without a byte order mark."""
    too_deep = f"it is nested more than {max_depth} deep"
    try:
        value: Json = json.loads(data.decode("utf-8-sig"))
        if _SURROGATE.search(data):
            json.dumps(value, ensure_ascii=False).encode()  # a lone half is text that can never be written again
    except RecursionError:
        raise ValueError(too_deep) from None
    except UnicodeEncodeError:
        raise ValueError("it holds half a character (a lone surrogate)") from None
    if _is_deeper(value, max_depth):
        raise ValueError(too_deep)
    return value


def as_mapping(value: Json) -> Mapping[str, Json]:
    """The value where it is a JSON object; else ValueError."""
    if not isinstance(value, dict):
        raise ValueError("it is no JSON object")
    return value


def _is_deeper(value: Json, max_depth: int) -> bool:
    level: list[Json] = [value]
    for _ in range(max_depth):
        level = [
            inner
            for item in level
            if isinstance(item, dict | list)
            for inner in (item.values() if isinstance(item, dict) else item)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True
