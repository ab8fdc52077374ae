"""Bytes of plain and compressed files, with whole-file errors in a person's words.

In: a path and the name that a person knows it by. Out: a buffered stream of bytes, or DataError.
Must not know: what the bytes hold.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

import pyarrow as pa

from tunesmith.errors import DataError

MAX_LINE_BYTES = 64 * 2**20  # a longer line is a damaged file or an attack, not a training row
BLOCK_BYTES = 2**20
BOM = b"\xef\xbb\xbf"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


@contextmanager
def open_bytes(path: Path, name: str) -> Iterator[IO[bytes]]:
    """The file's bytes, decompressed by its suffix, without a UTF-8 byte order mark.

    Raises DataError, here or while it is read: damaged compression, UTF-16, an unreadable file.
    """
    suffix = path.suffix.lower()
    try:
        with _stream(path, suffix) as stream:
            head = stream.peek(len(BOM))
            if head.startswith(_UTF16):
                raise DataError("the file is UTF-16", where=name, remedy="Save it as UTF-8.")
            if head.startswith(BOM):
                stream.read(len(BOM))
            yield stream
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _damaged("gzip", name, error) from error
    except OSError as error:
        if suffix == ".zst" and error.strerror is None:  # how pyarrow reports what zstd says
            raise _damaged("zstd", name, error) from error
        raise DataError(f"cannot be read: {error.strerror or error}", where=name) from error


def too_long(where: str, unit: str, max_bytes: int) -> DataError:
    """The refusal of a line, element or document that is longer than any training row."""
    return DataError(
        f"the {unit} is longer than {max_bytes // 2**20} MiB",
        where=where,
        remedy="That is no training row; check how the file was written.",
    )


def _stream(path: Path, suffix: str) -> io.BufferedReader:
    raw: io.RawIOBase
    if suffix == ".gz":
        raw = cast(io.RawIOBase, gzip.GzipFile(path, "rb"))
    elif suffix == ".zst":
        raw = pa.input_stream(str(path), compression="zstd")
    else:
        raw = path.open("rb", 0)
    return io.BufferedReader(raw, BLOCK_BYTES)


def _damaged(kind: str, name: str, error: Exception) -> DataError:
    return DataError(
        f"the {kind} stream is damaged or cut off ({error})", where=name, remedy="Copy or download the file again."
    )
