"""Text files that are one row each.

In: files and their names. Out: chunks of whole documents. Must not know: what they say.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from tunesmith.data.sources import streams
from tunesmith.data.sources.chunks import DocumentChunk
from tunesmith.data.sources.groups import grouped

Document = tuple[str, bytes]


def read_documents(files: Sequence[tuple[str, Path]], num_rows: int, limit: int | None) -> Iterator[DocumentChunk]:
    """Chunks of documents. Raises DataError for one longer than MAX_LINE_BYTES, which is no one row."""
    for group in grouped(_documents(files), _size, num_rows=num_rows, limit=limit):
        names, texts = zip(*group, strict=True)
        yield DocumentChunk(names, texts)


def _documents(files: Sequence[tuple[str, Path]]) -> Iterator[Document]:
    for name, path in files:
        with streams.open_bytes(path, name) as stream:
            text = stream.read(streams.MAX_LINE_BYTES + 1)
        if len(text) > streams.MAX_LINE_BYTES:
            raise streams.too_long(name, "document", streams.MAX_LINE_BYTES)
        yield name, text


def _size(document: Document) -> int:
    return len(document[1])
