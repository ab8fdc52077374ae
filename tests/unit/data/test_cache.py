from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from tunesmith.data import cache
from tunesmith.data.cache import KEPT_DAYS, cached, read_entry


class Maker:
    """Fills an entry and counts how often."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, folder: Path) -> Mapping[str, object]:
        self.calls += 1
        (folder / "part").mkdir()
        (folder / "part" / "a.bin").write_bytes(b"abcdef")
        return {"notes": ["one"]}


def test_the_second_time_it_is_read(tmp_path: Path) -> None:
    make = Maker()
    first = cached("k", make, root=tmp_path)
    assert cached("k", make, root=tmp_path) == first == (tmp_path / "k", {"notes": ["one"]})
    assert make.calls == 1
    cached("other", make, root=tmp_path)
    assert make.calls == 2


@pytest.mark.parametrize("damage", ["flip", "cut", "delete", "manifest"])
def test_a_damaged_entry_is_made_again(tmp_path: Path, damage: str) -> None:
    make = Maker()
    folder, content = cached("k", make, root=tmp_path)
    file = folder / "part" / "a.bin"
    if damage == "flip":
        file.write_bytes(b"abcdeX")
    elif damage == "cut":
        file.write_bytes(b"abc")
    elif damage == "delete":
        file.unlink()
    else:
        (folder / "manifest.json").write_text("{")
    assert read_entry(folder) is None
    assert cached("k", make, root=tmp_path) == (folder, content)
    assert make.calls == 2
    assert file.read_bytes() == b"abcdef"


def test_a_failed_maker_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> Mapping[str, object]:
        (folder / "half").write_bytes(b"x")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        cached("k", fail, root=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_nobody_used_for_long_goes(tmp_path: Path) -> None:
    make = Maker()
    old, _ = cached("old", make, root=tmp_path)
    stamp = time.time() - (KEPT_DAYS + 1) * 86400
    os.utime(old / "manifest.json", (stamp, stamp))
    (tmp_path / ".tmp-k-99").mkdir()
    cached("new", make, root=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".tmp-k-99", "new"]


def test_a_folder_that_cannot_be_made_falls_back(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    folder, content = cached("k", Maker(), root=tmp_path / "file" / "cache")
    assert content == {"notes": ["one"]}
    assert (folder / "part" / "a.bin").read_bytes() == b"abcdef"


def test_the_key_knows_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    before = cache.cache_key({"a": 1})
    assert cache.cache_key({"a": 2}) != before
    monkeypatch.setattr(cache, "code_sha", lambda: "other code")
    assert cache.cache_key({"a": 1}) != before
