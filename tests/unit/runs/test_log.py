"""The run's log: whole lines, bounded, private, and never in the way."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from tunesmith.runs.log import MAX_TEXT, RunLog

HF = "hf_" + "aB3dE6gH9jK2mN5pQ8sT1vW4"


def events(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_an_event_is_one_line_with_time_level_details_and_text(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.write("info", "a\nb", at=0.25, details={"stage": "sft", "step": 3})
    assert events(tmp_path / "log.jsonl") == [
        {"time": "1970-01-01T00:00:00.250Z", "level": "info", "stage": "sft", "step": 3, "text": "a\nb"}
    ]


def test_secrets_are_left_out(tmp_path: Path) -> None:
    RunLog(tmp_path).write("error", f"failed with {HF}", details={"traceback": f"at {HF}"})
    assert HF.encode() not in (tmp_path / "log.jsonl").read_bytes()


def test_it_rotates_and_keeps_so_many(tmp_path: Path) -> None:
    log = RunLog(tmp_path, max_bytes=200, kept=2)
    for number in range(20):
        log.write("info", f"event {number:02}", at=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.1.jsonl", "log.2.jsonl", "log.jsonl"]
    assert all(path.stat().st_size <= 200 for path in tmp_path.iterdir())
    texts = [event["text"] for name in ("log.2", "log.1", "log") for event in events(tmp_path / f"{name}.jsonl")]
    assert texts == [f"event {number:02}" for number in range(20 - len(texts), 20)]


def test_the_file_is_private_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        RunLog(tmp_path).write("info", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "log.jsonl").stat().st_mode & 0o777 == 0o600


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "elsewhere"
    target.write_text("kept")
    (tmp_path / "log.jsonl").symlink_to(target)
    assert "cannot be written" in RunLog(tmp_path).write("info", "x")
    assert target.read_text() == "kept"


def test_a_full_disk_is_said_once_and_the_log_goes_on_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = RunLog(tmp_path)
    write = os.write
    left = [5]  # bytes that still fit

    def full(handle: int, data: bytes) -> int:
        if not left[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count, left[0] = left[0], 0
        return write(handle, data[:count])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        assert "No space left" in log.write("info", "first")
        assert log.write("info", "second") == ""
    assert log.write("info", "third") == ""
    torn, whole = (tmp_path / "log.jsonl").read_bytes().splitlines()
    assert len(torn) == 5
    assert json.loads(whole)["text"] == "third"


def test_a_torn_line_of_an_earlier_process_is_ended_first(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_bytes(b'{"text": "to')
    RunLog(tmp_path).write("info", "next")
    assert json.loads((tmp_path / "log.jsonl").read_bytes().splitlines()[1])["text"] == "next"


def test_an_endless_text_is_cut_in_the_middle(tmp_path: Path) -> None:
    RunLog(tmp_path).write("error", "a" * 50_000 + "z")
    text = str(events(tmp_path / "log.jsonl")[0]["text"])
    assert len(text) < MAX_TEXT + 100 and text.startswith("aaa") and text.endswith("aaz")
    assert "30,001 characters left out" in text


def test_a_lone_surrogate_stops_nothing(tmp_path: Path) -> None:
    assert RunLog(tmp_path).write("info", "\ud800") == ""
    assert len(events(tmp_path / "log.jsonl")) == 1
