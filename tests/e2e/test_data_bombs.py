"""Files made to fill the memory (TRAPS S12): refused in bounded memory and time, with the line where they are known."""

from __future__ import annotations

import gzip
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

MEBIBYTE = 2**20
MAX_RSS_MIB = 450  # imports take 90; a line of 64 MiB lies in memory as bytes and, of .json, as text
MAX_SECONDS = 5.0  # of processor time: the tests' machines are shared
READ = """
import re, sys, time
from pathlib import Path
from tunesmith.data.sources import read_rows
from tunesmith.errors import DataError
from tunesmith.recipe.models import Source
start = time.process_time()
try:
    read_rows(Source(path=sys.argv[1]))
except DataError as error:
    peak = re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())  # ru_maxrss would be the parent's
    print(time.process_time() - start, int(peak[1]) // 1024)
    print(str(error)[:2000])
"""


def _hole(head: bytes) -> Callable[[Path], None]:
    """The head, then 1 GiB of NULs that take no room on disk."""

    def write(path: Path) -> None:
        with path.open("wb") as file:
            file.write(head)
            file.truncate(1024 * MEBIBYTE)

    return write


def _repeat(head: bytes, unit: bytes, num_bytes: int, tail: bytes = b"") -> Callable[[Path], None]:
    def write(path: Path) -> None:
        opener = gzip.open if path.suffix == ".gz" else open
        block = unit * (MEBIBYTE // len(unit))
        with opener(path, "wb") as file:
            file.write(head)
            for _ in range(num_bytes // MEBIBYTE):
                file.write(block)
            file.write(tail)

    return write


def _exactly(data: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(data)

    return write


DEEP = b"[" * 100_000 + b"]" * 100_000
BOMBS: list[tuple[str, Callable[[Path], None], str]] = [
    ("a.jsonl", _hole(b'{"text": "one"}\n{"text": "'), ":2: the line is longer than 64 MiB"),
    ("a.json", _hole(b'[{"text": "'), ":1: the element is longer than 64 MiB"),
    ("a.csv", _hole(b"text\n"), ":2: the line is longer than 16 MiB"),
    ("a.txt", _hole(b"text"), ": the document is longer than 64 MiB"),
    ("a.jsonl.gz", _repeat(b'{"text": "', b"a", 200 * MEBIBYTE), ":1: the line is longer than 64 MiB"),
    ("a.json.gz", _repeat(b'[{"text": "', b'\\"', 200 * MEBIBYTE), ":1: the element is longer than 64 MiB"),
    ("a.json", _repeat(b'[{"text": "', b"a", 60 * MEBIBYTE, b'"}, oops'), ":1: not JSON"),
    ("a.jsonl", _exactly(b'{"a": ' + DEEP + b"}\n"), ":1: line: found nested deeper than 64 levels"),
    ("a.json", _exactly(b'[{"a": 1},\n' + DEEP + b"]"), ":2: nested deeper than 64 levels"),
    ("a.jsonl", _exactly(b'{"a": ' + b"9" * 60 * MEBIBYTE + b"}"), ":1: line: found a number of thousands of digits"),
    ("a.json", _exactly(b'[{"a": ' + b"9" * 60 * MEBIBYTE + b"}]"), "[0]: row: found a number of thousands of digits"),
    ("a.csv", _repeat(b'text\n"', b"a\n", 50 * MEBIBYTE), ":2: a quoted cell that is not closed by line"),
    ("a.csv", _repeat(b"text\n", b",", 15 * MEBIBYTE), ":2: line: found"),
]


@pytest.mark.parametrize(("name", "write", "message"), BOMBS, ids=range(len(BOMBS)))
def test_bombs(name: str, write: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    write(path)
    result = subprocess.run([sys.executable, "-c", READ, str(path)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    figures, _, text = result.stdout.partition("\n")
    seconds, rss_mib = map(float, figures.split())
    assert f"{path}{message}" in text
    assert seconds < MAX_SECONDS
    assert rss_mib < MAX_RSS_MIB
