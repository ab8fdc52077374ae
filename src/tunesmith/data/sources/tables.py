"""Rows of Parquet files and Arrow tables.

In: the file, or a table that lies in a memory map. Out: chunks of rows. Must not know: what the columns mean.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tunesmith.data.sources.chunks import CHUNK_BYTES, TableChunk, table_chunk
from tunesmith.data.sources.streams import BLOCK_BYTES
from tunesmith.errors import DataError


def read_parquet(path: Path, name: str, num_rows: int, limit: int | None) -> Iterator[TableChunk]:
    """Chunks of a Parquet file's rows. Raises DataError where it cannot be read."""
    try:
        # Without a buffer size, whole column chunks are read at once: often the file, since one row group is usual.
        with pq.ParquetFile(path, buffer_size=BLOCK_BYTES, pre_buffer=False) as file:
            check_columns(file.schema_arrow.names, name)
            size = min(num_rows, _rows_of_a_chunk(file.metadata))
            yield from _chunks(file.iter_batches(batch_size=size, use_threads=False), name, limit)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(
            f"not a readable Parquet file: {error}", where=name, remedy="Copy or download the file again."
        ) from error
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", where=name) from error


def _chunks(batches: Iterable[pa.RecordBatch], name: str, limit: int | None) -> Iterator[TableChunk]:
    first = 0
    for batch in batches:
        table = pa.Table.from_batches([batch if limit is None else batch.slice(0, limit - first)])
        if table.num_rows:
            yield table_chunk(table, name, first)
        first += table.num_rows
        if first == limit:
            return


def check_columns(names: list[str], where: str) -> None:
    """Raises DataError where two columns have one name: one of them would vanish."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DataError(f"two columns are named `{twice[0]}`", where=where, remedy="Give each column its own name.")


def _rows_of_a_chunk(metadata: pq.FileMetaData) -> int:
    num_bytes: int = sum(metadata.row_group(index).total_byte_size for index in range(metadata.num_row_groups))
    num_rows: int = metadata.num_rows
    return max(1, CHUNK_BYTES * num_rows // max(1, num_bytes))
