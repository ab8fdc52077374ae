"""Rows to groups of a bounded number and size.

In: rows one by one. Out: lists of them. Must not know: what a row is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TypeVar

from tunesmith.data.sources.chunks import CHUNK_BYTES

Item = TypeVar("Item")


def grouped(
    items: Iterable[Item], size: Callable[[Item], int], *, num_rows: int, limit: int | None
) -> Iterator[list[Item]]:
    """The first `limit` items in lists of `num_rows`, shorter where their sizes (bytes) reach CHUNK_BYTES."""
    group: list[Item] = []
    num_bytes = 0
    for item in islice(items, limit):
        group.append(item)
        num_bytes += size(item)
        if len(group) == num_rows or num_bytes >= CHUNK_BYTES:
            yield group
            group, num_bytes = [], 0
    if group:
        yield group
