from __future__ import annotations

import datetime
import decimal
import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.unit.data.build import source
from tunesmith.data.sources import cells, iter_rows, open_source, read_rows
from tunesmith.data.types import BadRow, Json, Row
from tunesmith.errors import DataError


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def fields(path: Path) -> list[dict[str, Json]]:
    return [dict(row.fields) for row in read_rows(source(path))]


def bad(path: Path) -> list[tuple[str, str]]:
    """The id after the file's name and what was found, of each bad row."""
    return [
        (row.id.removeprefix(str(path)), f"{row.field}: {row.found}")
        for row in iter_rows(source(path))
        if isinstance(row, BadRow)
    ]


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as error:
        read_rows(source(path))
    return str(error.value).removeprefix(str(path))


def test_csv_cells_are_strings_and_empty_ones_null(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", '\ufeffq,a\r\n1,""\r\n\r\n"two, ""2""\r\nlines",é\u2028x\r\n')
    rows = read_rows(source(path))
    assert [row.id.rpartition(":")[2] for row in rows] == ["2", "4"]
    assert fields(path) == [{"q": "1", "a": None}, {"q": 'two, "2"\r\nlines', "a": "é\u2028x"}]


def test_tsv(tmp_path: Path) -> None:
    assert fields(write(tmp_path / "a.tsv", "q\ta\n1,5\t2\n")) == [{"q": "1,5", "a": "2"}]


def test_bad_records_are_named_and_the_others_read(tmp_path: Path) -> None:
    data = b'q,a\n1,2\n1\n1,2,3\n1,caf\xe9\n1,a\0b\n"x"y,2\n3,4\n'
    path = write(tmp_path / "a.csv", data)
    assert bad(path) == [
        (":3", "line: 1 cells"),
        (":4", "line: 3 cells"),
        (":5", "line: not UTF-8: byte 0xe9 at byte 6 of the line"),
        (":6", "line: a NUL character at byte 4 of the line"),
        (":7", "line: not CSV: ',' expected after '\"'"),
    ]
    good = [row for row in iter_rows(source(path)) if isinstance(row, Row)]
    assert [row.fields["q"] for row in good] == ["1", "3"]


def test_a_quote_that_is_cut_off_in_the_last_line_is_one_bad_row(tmp_path: Path) -> None:
    assert bad(write(tmp_path / "a.csv", 'q,a\n1,2\n1,"cut')) == [(":3", "line: not CSV: a quote that is never closed")]


def test_a_quote_that_swallows_lines_refuses_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ":2: a quoted cell that is not closed by line 4" in refusal(
        write(tmp_path / "a.csv", 'q,a\n1,"2\n1,2\n3,4\n')
    )
    monkeypatch.setattr(cells, "MAX_CELL_CHARS", 2**20)
    path = write(tmp_path / "b.csv", 'q,a\n1,"2\n' + "1,2\n" * 2**19)
    assert ":2: a quoted cell that is not closed by line" in refusal(path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("q,a,q", ":1: the header has the name `q` twice"),
        (",a", ":1: the header has no name for column 1"),
        ("q;a", ":1: the header is one column, 'q;a'"),
        ('q,"a', ":1: the header is not CSV"),
    ],
)
def test_headers_are_refused(tmp_path: Path, header: str, message: str) -> None:
    assert message in refusal(write(tmp_path / "a.csv", header))


def test_documents_are_whole_files(tmp_path: Path) -> None:
    path = write(tmp_path / "a b é.txt", "\ufeffone\n\ntwo\r\n")
    (row,) = read_rows(source(path))
    assert (row.id, row.fields) == (str(path), {"text": "one\n\ntwo\r\n"})
    assert bad(write(tmp_path / "a.md", " \n")) == [("", "text: an empty file")]
    assert bad(write(tmp_path / "b.md", b"a\nbc\xff")) == [("", "text: not UTF-8: byte 0xff at byte 3 of line 2")]
    assert bad(write(tmp_path / "c.md", b"a\0")) == [("", "text: a NUL character, as in a binary or UTF-16 file")]
    assert "the file is UTF-16" in refusal(write(tmp_path / "d.md", "text".encode("utf-16")))


def test_parquet_types_without_a_json_twin(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    moment = datetime.datetime(2026, 11, 21, 12, tzinfo=datetime.UTC)
    columns = {"t": [moment], "d": [decimal.Decimal("1.50")], "n": [[{"x": float("nan")}]]}
    pq.write_table(pa.table(columns), path)
    assert fields(path) == [{"t": "2026-11-21T12:00:00+00:00", "d": "1.50", "n": [{"x": None}]}]
    pq.write_table(pa.table({"a": ["x", "y"], "b": [1.0, float("inf")]}), path)
    assert bad(path) == [("[1]", "b: a number that is not finite")]


def test_parquet_text_that_is_not_utf8_is_one_bad_row(tmp_path: Path) -> None:
    array = pa.StringArray.from_buffers(2, pa.py_buffer(b"\0\0\0\0\4\0\0\0\10\0\0\0"), pa.py_buffer(b"finecaf\xe9"))
    pq.write_table(pa.table({"a": array}), tmp_path / "a.parquet")
    assert [place for place, _ in bad(tmp_path / "a.parquet")] == ["[1]"]


def test_parquet_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    table = pa.table([pa.array(["x"]), pa.array(["y"])], names=["a", "a"])
    pq.write_table(table, tmp_path / "a.parquet")
    assert "two columns are named `a`" in refusal(tmp_path / "a.parquet")


def test_a_chunk_of_a_table_carries_its_own_rows_only(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"a": ["x" * 1000] * 1000}), path)
    chunks = list(open_source(source(path, limit=150)).raw_chunks(num_rows=100))
    assert [chunk.num_rows for chunk in chunks] == [100, 50]
    assert all(len(pickle.dumps(chunk)) < 2000 * chunk.num_rows for chunk in chunks)


def test_a_parquet_column_whose_name_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"questions": ["x"]}), path)
    path.write_bytes(path.read_bytes().replace(b"questions", b"questio\xe7s"))
    assert "not a readable Parquet file" in refusal(path)
