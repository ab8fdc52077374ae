"""Rows from files, folders and data sets.

In: a source of the recipe. Out: rows with their place and content hash, bad rows with what is wrong there,
or one DataError where the whole source cannot be read.
Must not know: what the columns mean, tokenizers, stages.
"""

from __future__ import annotations

from tunesmith.data.sources.chunks import RawChunk
from tunesmith.data.sources.hashing import content_sha
from tunesmith.data.sources.opened import OpenedSource, open_source
from tunesmith.data.sources.paths import SUFFIXES, resolve
from tunesmith.data.sources.rows import (
    check_renames,
    empty_error,
    iter_rows,
    read_chunk,
    read_rows,
)

__all__ = [
    "SUFFIXES",
    "OpenedSource",
    "RawChunk",
    "check_renames",
    "content_sha",
    "empty_error",
    "iter_rows",
    "open_source",
    "read_chunk",
    "read_rows",
    "resolve",
]
