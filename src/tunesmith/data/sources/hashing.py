"""Content hashes of rows and files.

In: JSON values, files. Out: sha256 in hex. Must not know: where a file lies, what a row means.
"""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path

from tunesmith.data.types import Json

# One encoder for all rows: `json.dumps` with these options makes a new one every call, which costs a third.
_CANONICAL = json.JSONEncoder(sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def content_sha(value: Json) -> str:
    """sha256 of the value as canonical JSON: keys sorted, no spaces, UTF-8."""
    return hashlib.sha256(_CANONICAL.encode(value).encode()).hexdigest()


def file_sha(path: Path) -> str:
    """sha256 of the file's bytes; read once a process while its size and time stay the same."""
    status = path.stat()
    return _file_sha(path.absolute(), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=4096)
def _file_sha(path: Path, _size: int, _time: int) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
