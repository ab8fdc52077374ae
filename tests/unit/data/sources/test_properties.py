"""Any rows, any cut of the file: nothing is lost, nothing is changed."""

from __future__ import annotations

import csv
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.data.build import source
from tunesmith.data.sources import content_sha, iter_rows, open_source, read_chunk, streams
from tunesmith.data.sources.chunks import JsonChunk
from tunesmith.data.types import BadRow, Json, Row

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)
objects = st.dictionaries(texts, values, max_size=5)
few = settings(max_examples=60, deadline=None)


def read(name: str, data: bytes, num_rows: int = 3) -> list[Row | BadRow]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(data)
        given = source(path)
        return [row for raw in open_source(given).raw_chunks(num_rows) for row in read_chunk(raw, given)]


@given(st.lists(objects, max_size=8), st.booleans(), st.sampled_from([None, 1]))
@few
def test_json_lines_and_arrays_hold_what_was_written(
    rows: list[dict[str, Json]], plain: bool, indent: int | None
) -> None:
    lines = "".join(json.dumps(row, ensure_ascii=plain) + "\r\n" for row in rows).encode()
    array = json.dumps(rows, ensure_ascii=plain, indent=indent).encode()
    for name, data in (("a.jsonl", lines), ("a.json", array)):
        found = read(name, data)
        assert [row.fields for row in found if isinstance(row, Row)] == rows
        assert [row.sha for row in found] == [content_sha(row) for row in rows]


@given(st.lists(st.text("ab\"',]}\\\r\n \0\ud800é", max_size=6), max_size=4), st.integers(1, 9))
@few
def test_windows_of_any_size_cut_the_same_elements(words: list[str], block: int) -> None:
    elements = [json.dumps({"a": word, "n": [1.5, -2]}).encode() for word in words]
    before, streams.BLOCK_BYTES = streams.BLOCK_BYTES, block
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "a.json")
            path.write_bytes(b" [" + b" ,\n".join(elements) + b"]\n")
            chunks = list(open_source(source(path)).raw_chunks())
    finally:
        streams.BLOCK_BYTES = before
    assert [text for chunk in chunks if isinstance(chunk, JsonChunk) for text in chunk.texts] == elements


@given(st.lists(st.lists(texts.filter(lambda text: "\0" not in text), min_size=2, max_size=2), max_size=8))
@few
def test_csv_cells_survive(records: list[list[str]]) -> None:
    out = io.StringIO(newline="")
    writer = csv.writer(out)
    writer.writerows([["q", "a"], *records])
    found = read("a.csv", out.getvalue().encode())
    assert [list(row.fields.values()) for row in found if isinstance(row, Row)] == [
        [cell or None for cell in record] for record in records
    ]


@given(st.lists(objects, min_size=1, max_size=5), st.data())
@few
def test_a_damaged_file_loses_no_line_in_silence(rows: list[dict[str, Json]], data: st.DataObject) -> None:
    lines = [json.dumps(row).encode() for row in rows]
    number = data.draw(st.integers(0, len(lines) - 1))
    place = data.draw(st.integers(0, len(lines[number]) - 1))
    byte = data.draw(st.integers(0, 255).filter(lambda byte: byte not in b"\n\r[ \t\v\f\x1c\x1d\x1e\x1f\x85"))
    lines[number] = lines[number][:place] + bytes([byte]) + lines[number][place + 1 :]
    found = read("a.jsonl", b"\n".join(lines))
    assert len(found) == len(rows)
    assert all(isinstance(row, Row) for index, row in enumerate(found) if index != number)


def test_iter_rows_gives_what_the_chunks_give(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\nbad\n{"a": 2}\n')
    kinds: list[Callable[..., object]] = [type(row) for row in iter_rows(source(path))]
    assert kinds == [Row, BadRow, Row]
