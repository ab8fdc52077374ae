"""File types: which reader cuts which suffix into raw chunks, in constant memory however long the file is.

In: a file, its name, the size of a chunk and how many rows are wanted. Out: raw chunks in the file's order, or a
DataError for what is wrong with the whole file. Must not know: folders, the recipe, what columns mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from tunesmith.data.sources.cells import read_commas, read_tabs
from tunesmith.data.sources.chunks import RawChunk
from tunesmith.data.sources.elements import read_array
from tunesmith.data.sources.lines import read_lines
from tunesmith.data.sources.tables import read_parquet

Reader = Callable[[Path, str, int, int | None], Iterator[RawChunk]]
"""Called with the path, the name, the most rows of a chunk and the most rows in all (None: every row)."""

READERS: dict[str, Reader] = {
    ".jsonl": read_lines,
    ".jsonl.gz": read_lines,
    ".jsonl.zst": read_lines,
    ".json": read_array,
    ".json.gz": read_array,
    ".json.zst": read_array,
    ".parquet": read_parquet,
    ".csv": read_commas,
    ".tsv": read_tabs,
}
