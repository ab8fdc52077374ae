"""JSON of others is read within limits."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tunesmith.runs.bounded import as_mapping, parse_json, read_bytes, read_json


def test_values_come_through(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": [1, {"b": null}]}')
    assert read_json(tmp_path / "a.json") == {"a": [1, {"b": None}]}


@pytest.mark.parametrize("depth", [65, 2000, 500_000])
@pytest.mark.parametrize("shape", ["[]", "{}"])
def test_deep_nesting_is_refused(depth: int, shape: str) -> None:
    opening = "[" if shape == "[]" else '{"a":'
    closing = "]" if shape == "[]" else "}"
    text = opening * depth + ("1" if shape == "{}" else "") + closing * depth
    with pytest.raises(ValueError, match="nested more than 64 deep"):
        parse_json(text.encode())


def test_64_levels_are_read() -> None:
    assert parse_json(b"[" * 64 + b"]" * 64) is not None


def test_large_files_are_not_read_to_their_end(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b" " * 101)
    with pytest.raises(ValueError, match="more than 100 bytes"):
        read_bytes(tmp_path / "a.json", max_bytes=100)


def test_pipes_and_devices_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    for path in (tmp_path / "pipe.json", Path("/dev/zero")):
        with pytest.raises(ValueError, match="no regular file"):
            read_json(path)


def test_numbers_of_a_million_digits_are_refused() -> None:
    with pytest.raises(ValueError):
        parse_json(b"1" * 1_000_000)


def test_only_objects_are_mappings() -> None:
    with pytest.raises(ValueError, match="no JSON object"):
        as_mapping([])


def test_half_a_character_is_refused_and_whole_ones_are_not() -> None:
    # json reads the lone half, and no file could ever be written with it
    with pytest.raises(ValueError, match="half a character"):
        parse_json(rb'{"a": "\ud83d"}')
    assert parse_json(rb'{"a": "\ud83d\ude00 \u00e9"}') == {"a": "😀 é"}
