from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tunesmith.errors import ResourceError, RunFolderError
from tunesmith.runs import atomic, disk
from tunesmith.runs.records import Records, append_record, read_records, sync_records, truncate_records


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


@pytest.mark.parametrize(
    "rest", [b"\0\0\0\0", b"\0\0\n", b"[" * 9999 + b"\n", b'ep": 3}\n{"step": 4}\n', b'{"step": 4}\n{"st']
)
def test_whatever_a_power_cut_made_of_later_records_is_cut_off(tmp_path: Path, rest: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = b'{"step": 1}\n{"step": 2}\n'
    path.write_bytes(whole + rest)
    assert [record["step"] for record in truncate_records(path, 2)] == [1, 2]
    assert path.read_bytes() == whole


def test_a_damaged_record_that_must_stay_is_named_and_nothing_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    before = b'{"step": 1}\n\0\0\0\n{"step": 3}\n{"step": 4}\n'
    path.write_bytes(before)
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl:2: not a JSON object"):
        truncate_records(path, 3)
    assert path.read_bytes() == before


def test_an_append_cuts_off_what_an_earlier_one_left_half_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"st')
    append_record(path, {"step": 2})
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


def test_records_that_a_disk_does_not_take_wait_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "WAITS_SECONDS", (0.0, 0.0, 0.0))
    path, records = tmp_path / "metrics.jsonl", Records()
    records.append(path, {"step": 1})
    real = os.write

    def torn(handle: int, data: bytes) -> int:
        if len(data) > 4:
            return real(handle, bytes(data)[:4])
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as failing:
        failing.setattr(os, "write", torn)
        records.append(path, {"step": 2})
        records.append(path, {"step": 3})
        with pytest.raises(ResourceError):
            records.flush(path)
    assert records.behind
    assert path.read_bytes() == b'{"step": 1}\n'  # no half of a line is left
    assert records.content(path) == b'{"step": 1}\n{"step": 2}\n{"step": 3}\n'
    records.flush(path)
    assert not records.behind
    assert [record["step"] for record in read_records(path)] == [1, 2, 3]


def test_a_sync_that_failed_once_writes_all_of_it_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a failed fsync the next one may call lost pages a success."""
    monkeypatch.setattr(disk, "WAITS_SECONDS", (0.0, 0.0, 0.0))
    path = tmp_path / "metrics.jsonl"
    append_record(path, {"step": 1})
    before, failures = path.stat().st_ino, [OSError(errno.EIO, "Input/output error")]
    real = os.fsync

    def failing(handle: int) -> None:
        if failures:
            raise failures.pop()
        real(handle)

    monkeypatch.setattr(atomic.os, "fsync", failing)
    sync_records(path)
    assert path.stat().st_ino != before
    assert read_records(path) == [{"step": 1}]
