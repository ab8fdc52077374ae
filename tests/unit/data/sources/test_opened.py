from __future__ import annotations

import gzip
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.unit.data.build import source, write_jsonl
from tunesmith.data.sources import chunks, open_source, read_chunk, read_rows, resolve
from tunesmith.data.types import Row
from tunesmith.errors import DataError


def refusal(path: Path | str, **knobs: object) -> str:
    with pytest.raises(DataError) as error:
        read_rows(source(path, **knobs))
    return str(error.value)


def texts(path: Path | str, **knobs: object) -> list[object]:
    return [row.fields["text"] for row in read_rows(source(path, **knobs))]


def zst(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return bytes(sink.getvalue().to_pybytes())


def test_the_same_rows_from_every_packing(tmp_path: Path) -> None:
    values = [{"text": "é\u2028"}, {"text": "b"}]
    lines = "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values).encode()
    array = json.dumps(values, indent=1).encode()
    for name, pack in {"": bytes, ".gz": gzip.compress, ".zst": zst}.items():
        (tmp_path / f"a.jsonl{name}").write_bytes(pack(lines))
        (tmp_path / f"a.json{name}").write_bytes(pack(array))
        rows = [*read_rows(source(tmp_path / f"a.jsonl{name}")), *read_rows(source(tmp_path / f"a.json{name}"))]
        assert [row.fields for row in rows] == values * 2
        assert [row.id for row in rows][1:3] == [f"{tmp_path}/a.jsonl{name}:2", f"{tmp_path}/a.json{name}[0]"]


def test_damaged_zstd(tmp_path: Path) -> None:
    whole = zst(os.urandom(2000).hex().encode())
    for data in (whole[:-3], b"plain text", whole[: len(whole) // 2]):
        (tmp_path / "a.jsonl.zst").write_bytes(data)
        assert "a.jsonl.zst: the zstd stream is damaged or cut off" in refusal(tmp_path / "a.jsonl.zst")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files of rows, a table, and things that are passed over."""
    folder = tmp_path / "my data é"
    (folder / "more").mkdir(parents=True)
    write_jsonl(folder / "b.jsonl", {"text": "2"})
    write_jsonl(folder / "a.jsonl", {"text": "1"})
    write_jsonl(folder / "more/c.jsonl", {"text": "4"})
    pq.write_table(pa.table({"text": ["3"]}), folder / "c.parquet")
    for name in (".hidden.jsonl", "notes.docx", "README.md", "old.zip"):
        (folder / name).write_text("x")
    return folder


def test_a_folder_is_read_in_order_and_says_what_it_passes_over(folder: Path) -> None:
    opened = open_source(source(f"{folder}/"))
    assert texts(folder) == ["1", "2", "3"]
    ids = [row.id for row in read_rows(source(folder))]
    assert ids == [f"{folder}/a.jsonl:1", f"{folder}/b.jsonl:1", f"{folder}/c.parquet[0]"]
    assert opened.notes == (
        "not read, a folder: more.",
        "not read, about the data: README.md.",
        "not read, an archive (unpack it first): old.zip.",
        "not read, hidden: .hidden.jsonl.",
        "not read, unsupported kind of file: notes.docx.",
    )
    assert texts(folder, limit=2) == ["1", "2"]
    assert opened.num_bytes == sum((folder / name).stat().st_size for name in ("a.jsonl", "b.jsonl", "c.parquet"))


def test_patterns(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert texts(f"{folder}/*.jsonl") == ["1", "2"]
    assert texts(f"{folder}/**/*.jsonl") == ["1", "2", "4"]
    assert "no file matches this pattern" in refusal(f"{folder}/*.csv")
    monkeypatch.chdir(folder.parent)
    assert [row.id for row in read_rows(source("my*/b.jsonl"))] == ["my data é/b.jsonl:1"]
    write_jsonl(folder / "[1].jsonl", {"text": "a name with brackets"})
    assert texts(folder / "[1].jsonl") == ["a name with brackets"]


def test_a_folder_without_rows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.docx").write_text("x")
    text = refusal(tmp_path / "data")
    assert "data: no file here can be read\n  Supported: .jsonl" in text
    assert "a.docx" in text


def test_links_out_of_a_folder_are_refused(folder: Path) -> None:
    secret = write_jsonl(folder.parent / "secret.jsonl", {"text": "s"})
    (folder / "z.jsonl").symlink_to(secret)
    for path in (folder, f"{folder}/*.jsonl"):
        assert "z.jsonl: a link that leads out of the folder" in refusal(path)
    assert texts(folder / "z.jsonl") == ["s"]


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tgz", "a.jsonl.tar.gz", "A.ZIP"])
def test_archives_are_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    assert "archives are not read" in refusal(tmp_path / name)


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    assert "not a regular file" in refusal(tmp_path / "a.jsonl")


def test_paths_that_no_system_opens(tmp_path: Path) -> None:
    assert "not a path that this system can open" in refusal(tmp_path / ("n" * 300 + ".jsonl"))
    name = "é" * 124 + ".jsonl"  # 254 bytes
    assert texts(write_jsonl(tmp_path / name, {"text": "long name"})) == ["long name"]
    with pytest.raises(DataError, match="this is a folder, not a file"):
        resolve(str(tmp_path))


@pytest.mark.parametrize(
    "path", ["data/foo.jsonl", "./org/rows", "rows", "a/b/c", "data/rows", "org/rows.zip", "../x/y"]
)
def test_a_slip_in_a_local_path_asks_no_hub(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    assert f"{path}: no such file\n  Paths are relative to" in refusal(path)


def test_settings_of_data_sets_are_refused_for_files(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", {"text": "a"})
    assert "`split` is for data sets, and this is none\n  Leave `split` out. To read the first" in refusal(
        path, split="train"
    )
    assert "`config` is for data sets" in refusal(path, config="en")


def test_the_hash_follows_bytes_and_settings_not_the_place(folder: Path, tmp_path: Path) -> None:
    def sha(path: Path | str, **knobs: object) -> str:
        return open_source(source(path, **knobs)).content_sha()

    before = sha(folder)
    moved = tmp_path / "moved"
    folder.rename(moved)
    assert sha(moved) == before
    assert sha(f"{moved}/*.jsonl") != before
    assert sha(moved, limit=1) != before
    assert sha(moved, columns={"answer": "text"}) == before  # what is read of a row is the format's part
    (moved / "b.jsonl").rename(moved / "d.jsonl")
    assert sha(moved) != before
    (moved / "d.jsonl").rename(moved / "b.jsonl")
    write_jsonl(moved / "b.jsonl", {"text": "22"})
    assert sha(moved) != before


def test_chunks_are_bounded_in_rows_and_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", *({"text": "x" * 90} for _ in range(10)))  # 104 bytes a line
    opened = open_source(source(path, limit=9))
    assert [chunk.num_rows for chunk in opened.raw_chunks(4)] == [4, 4, 1]
    monkeypatch.setattr("tunesmith.data.sources.groups.CHUNK_BYTES", 300)
    assert [chunk.num_rows for chunk in opened.raw_chunks(4)] == [3, 3, 3]


def test_a_chunk_parses_the_same_in_another_process(tmp_path: Path) -> None:
    from_source = source(write_jsonl(tmp_path / "a.jsonl", {"q": "1"}, "bad", {"q": "2"}), columns={"text": "q"})
    (raw,) = open_source(from_source).raw_chunks()
    assert isinstance(raw, chunks.JsonChunk)
    rows = read_chunk(pickle.loads(pickle.dumps(raw)), from_source)
    assert rows == read_chunk(raw, from_source)
    assert [row.fields if isinstance(row, Row) else row.found for row in rows] == [
        {"text": "1"},
        "a string",
        {"text": "2"},
    ]


def test_a_rename_may_be_found_in_a_late_chunk(tmp_path: Path) -> None:
    rows = [*({"text": "x"} for _ in range(1500)), {"text": "y", "why": "late"}]
    path = write_jsonl(tmp_path / "a.jsonl", *rows)
    assert read_rows(source(path, columns={"reason": "why"}))[-1].fields == {"text": "y", "reason": "late"}


def _array(text: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / "a.json").write_text(text)
        return folder / "a.json"

    return write


@pytest.mark.parametrize("block", [1, 2, 3, 7, 64])
def test_elements_are_cut_alike_whatever_the_window(
    block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tunesmith.data.sources.streams.BLOCK_BYTES", block)
    values = [{"text": 'a "quoted" \\ [x] é😀\u2028\n'}, {"n": 12.5e3, "t": [True, None, {"a": "]"}]}, {}]
    path = _array(json.dumps(values, indent=2, ensure_ascii=False) + "\n")(tmp_path)
    assert [row.fields for row in read_rows(source(path))] == values
    _array('[{"a": 1},\n {"a": 2} {"a": 3}]')(tmp_path)
    assert f"{path}:2: not JSON at column 11: Expecting ',' delimiter" in refusal(path)
    _array('[{"a": 1},\n {"a": tru')(tmp_path)
    assert f"{path}:2: not JSON at column 8: Expecting value" in refusal(path)
    _array('[{"a": 1}]\n[]')(tmp_path)
    assert f"{path}:2: not JSON at column 1: Extra data" in refusal(path)
    _array('[{"a": 1},\n 12345678901234567890')(tmp_path)
    assert "The file is cut off" in refusal(path)
