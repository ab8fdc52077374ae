from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith.errors import RunFolderError
from tunesmith.runs.records import append_record, read_records, truncate_records


def test_floats_come_back_exactly_and_nan_as_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_record(path, {"step": 1, "loss": 0.1 + 0.2, "gap": float("nan")})
    assert path.read_text() == '{"step": 1, "loss": 0.30000000000000004, "gap": null}\n'
    assert read_records(path) == [{"step": 1, "loss": 0.30000000000000004, "gap": None}]


def test_no_file_gives_no_records(tmp_path: Path) -> None:
    assert read_records(tmp_path / "absent.jsonl") == []
    assert truncate_records(tmp_path / "absent.jsonl", 3) == []
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("torn", [b'{"step": 3, "lo', b'{"step": 3}', b"\xff"])  # the second lacks its end of line
def test_a_torn_last_line_is_left_out_and_cut_off(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = b'{"step": 1}\n{"step": 2}\n'
    path.write_bytes(whole + torn)
    assert [record["step"] for record in read_records(path)] == [1, 2]
    assert len(truncate_records(path, 5)) == 2
    assert path.read_bytes() == whole


def test_truncate_keeps_the_bytes_up_to_the_step(tmp_path: Path) -> None:
    path = tmp_path / "eval.jsonl"
    for step in (0, 2, 4, 6):
        append_record(path, {"step": step, "loss": 1 / 3})
    before = path.read_bytes()
    assert [record["step"] for record in truncate_records(path, 4)] == [0, 2, 4]
    assert before.startswith(path.read_bytes())
    assert truncate_records(path, -1) == []
    assert path.read_bytes() == b""


def test_a_bad_line_before_the_last_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnot json\n{"step": 3}\n')
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl:2: not a JSON object"):
        read_records(path)


def test_text_separators_inside_a_string_do_not_break_lines(tmp_path: Path) -> None:
    path = tmp_path / "notes.jsonl"
    append_record(path, {"step": 1, "text": "a b c\u2028d\x85e\x0cf"})
    assert read_records(path) == [{"step": 1, "text": "a b c\u2028d\x85e\x0cf"}]
