from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.unit.data.build import source, write_jsonl
from tunesmith.data.sources import content_sha, read_rows, streams
from tunesmith.errors import DataError


def refusal(path: Path, data: bytes | None = None, **knobs: object) -> str:
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(DataError) as error:
        read_rows(source(path, **knobs))
    return str(error.value)


def test_jsonl_rows_carry_physical_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n\n  \n{"text": "two"}\n')
    rows = read_rows(source(path))
    assert [(row.id, row.fields) for row in rows] == [(f"{path}:1", {"text": "one"}), (f"{path}:4", {"text": "two"})]


def test_bom_crlf_nul_and_unicode_line_breaks_are_content_or_harmless(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes('\ufeff{"text": "a\u2028b\u0085c"}\r\n{"text": "nul \\u0000 in"}\r\n'.encode())
    assert [row.fields["text"] for row in read_rows(source(path))] == ["a\u2028b\u0085c", "nul \0 in"]


def test_json_array_gzip_and_parquet_hold_the_same_rows(tmp_path: Path) -> None:
    values = [{"text": "é", "n": 1}, {"text": "b", "n": 2}]
    (tmp_path / "a.json").write_text(json.dumps(values))
    write_jsonl(tmp_path / "a.jsonl.gz", *values)
    pq.write_table(pa.Table.from_pylist(values), tmp_path / "a.parquet")
    kinds = {name: read_rows(source(tmp_path / name)) for name in ("a.json", "a.jsonl.gz", "a.parquet")}
    assert [[row.fields for row in rows] for rows in kinds.values()] == [values] * 3
    assert len({tuple(row.sha for row in rows) for rows in kinds.values()}) == 1
    assert [row.id.removeprefix(str(tmp_path)) for row in kinds["a.json"]] == ["/a.json[0]", "/a.json[1]"]
    assert kinds["a.parquet"][1].id.endswith("a.parquet[1]")
    assert kinds["a.jsonl.gz"][1].id.endswith("a.jsonl.gz:2")


def test_sha_ignores_key_order_and_sees_every_value() -> None:
    assert content_sha({"a": 1, "b": "x"}) == content_sha({"b": "x", "a": 1})
    assert content_sha({"a": 1}) != content_sha({"a": "1"})
    # sha256 of {"a":1}, worked out with sha256sum
    assert content_sha({"a": 1}).startswith("015abd7f5cc57a2d")


def test_limit_reads_the_first_rows_only(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n{"text": "two"}\nnot json\n')
    assert len(read_rows(source(path, limit=2))) == 2


def test_columns_are_renamed_and_the_old_names_disappear(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", {"q": "1", "a": "2"})
    (row,) = read_rows(source(path, columns={"question": "q", "answer": "a"}))
    assert row.fields == {"question": "1", "answer": "2"}
    (swapped,) = read_rows(source(path, columns={"q": "a", "a": "q"}))
    assert swapped.fields == {"q": "2", "a": "1"}


def test_a_rename_of_a_missing_column_names_the_keys_found(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", {"q": "1", "a": "2"})
    assert "no row has `question`\n  Keys found: a, q." in refusal(path, columns={"prompt": "question"})


def test_a_rename_onto_another_column_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", {"prompt": "1", "q": "2"})
    assert (
        f"{path}:1: prompt: found `prompt` in the row, and `columns` renames `q` to `prompt`; wanted one of"
        in refusal(path, columns={"prompt": "q"})
    )


def test_missing_file_folder_suffix_and_empty_files(tmp_path: Path) -> None:
    assert f"{tmp_path}/none.jsonl: no such file\n  Paths are relative to the working directory" in refusal(
        tmp_path / "none.jsonl"
    )
    assert "Supported: .jsonl, .jsonl.gz, .jsonl.zst, .json," in refusal(tmp_path / "a.xlsx", b"a,b\n")
    for name in ("a.jsonl", "a.json", "a.csv"):
        assert "the file holds no rows" in refusal(tmp_path / name, b" \n")
    assert "the file holds no rows" in refusal(tmp_path / "b.json", b"[]")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', "line: found not JSON at column 13: Expecting ',' delimiter; the line is cut off"),
        (b'{"text": "a', "line: found not JSON at column 10: Unterminated string starting at; the line is cut off"),
        (b"{'text': 1}", "line: found not JSON at column 2: Expecting property name enclosed in double quotes"),
        (b'{"a": 1} {"b": 2}', "line: found not JSON at column 10: Extra data; wanted one whole JSON object a line"),
        (b'{"text": NaN}', "line: found not JSON: NaN; wanted a finite number or null"),
        (b'{"text": -Infinity}', "line: found not JSON: -Infinity"),
        (b'{"a": "x", "text": 1e999}', "text: found a number that is not finite"),
        (b'["a"]', "line: found an array; wanted an object with named fields"),
        (b'"a"', "line: found a string; wanted an object"),
        (b"3", "line: found a number; wanted an object"),
        (b"null", "line: found null; wanted an object"),
        (b"\0\0\0", "line: found not JSON at column 1"),
        (b'{"a": "x", "text": "\\ud83d"}', "text: found half of a surrogate pair (\\ud83d)"),
        (b'{"\\ud83d": "x"}', "\\ud83d: found half of a surrogate pair (\\ud83d)"),
        (b'{"text": "caf\xe9"}', "line: found not UTF-8: byte 0xe9 at byte 14 of the line; wanted UTF-8"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "line: found the key 'c' twice in one object; wanted every key once"),
        (b'{"a": ' + b"[" * 64 + b"]" * 64 + b"}", "line: found nested deeper than 64 levels"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "line: found nested deeper than 64 levels"),
        (b'{"n": ' + b"9" * 5000 + b"}", "line: found a number of thousands of digits"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "a.jsonl"
    found = refusal(path, b'{"text": "fine"}\n' + line + b"\n")
    assert f"{path}: 1 of 2 rows cannot be read:\n  {path}:2: {message}" in found


def test_a_line_past_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MAX_LINE_BYTES", 2**20)
    data = b'{"text": "' + b"a" * 2**20 + b'"}\n'
    assert ":1: the line is longer than 1 MiB" in refusal(tmp_path / "a.jsonl", data)


def test_whole_json_files_name_line_and_column(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    assert f"{path}:3: not JSON at column 1: Expecting value" in refusal(path, b'[{"a": 1},\n {"a": 2},\n]')
    text = refusal(path, b'[\n {"a": "\xff"}]')
    assert f"{path}[0]: row: found not UTF-8: byte 0xff at byte 8 of the row (the row begins on line 2)" in text
    assert "name it .jsonl" in refusal(path, b'{"a": 1}\n{"a": 2}\n')
    assert "one JSON object (keys: data, info), not an array" in refusal(path, b'{"data": [], "info": 1}')
    assert "the file holds a string, not an array" in refusal(path, b'"a"')
    assert f"{path}[1]: row: found a number (the row begins on line 1)" in refusal(path, b'[{"a": 1}, 2]')


def test_an_array_named_jsonl_is_told_its_name(tmp_path: Path) -> None:
    assert "Name it .json, not .jsonl." in refusal(tmp_path / "a.jsonl", b'[{"a": 1}]\n')


def test_damaged_gzip_and_parquet(tmp_path: Path) -> None:
    whole = gzip.compress(b'{"text": "a"}\n' * 1000)
    for data in (whole[: len(whole) // 2], b"plain text", whole[:20] + b"\0\0\0\0" + whole[24:]):
        assert "the gzip stream is damaged or cut off" in refusal(tmp_path / "a.jsonl.gz", data)
    assert "not a readable Parquet file" in refusal(tmp_path / "a.parquet", b"PAR1 nothing")


def test_parquet_nulls_and_values_without_a_json_form(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"a": [1.5, float("nan")], "b": ["x", None]}), path)
    assert [row.fields for row in read_rows(source(path))] == [{"a": 1.5, "b": "x"}, {"a": None, "b": None}]
    pq.write_table(pa.table({"a": [b"bytes"]}), path)
    assert f"{path}[0]: a: found bytes, which has no JSON form" in refusal(path)
