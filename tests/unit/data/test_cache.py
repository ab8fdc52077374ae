from __future__ import annotations

import os
import signal
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
    (tmp_path / ".tmp-k-99").mkdir()  # too young to say that nobody makes it
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


def test_of_two_that_make_one_entry_the_second_takes_what_is_there(tmp_path: Path) -> None:
    """Where it published its own, the first would read from a folder that is gone for a moment (F42)."""
    inner = Maker()

    def slow(folder: Path) -> Mapping[str, object]:
        cached("k", inner, root=tmp_path)  # the other process is faster
        (folder / "mine").write_bytes(b"x")
        return {"notes": ["two"]}

    folder, content = cached("k", slow, root=tmp_path)
    assert content == {"notes": ["one"]}
    assert (folder / "part" / "a.bin").read_bytes() == b"abcdef"
    assert list(tmp_path.iterdir()) == [folder]


def test_a_damaged_entry_that_came_meanwhile_is_replaced(tmp_path: Path) -> None:
    def slow(folder: Path) -> Mapping[str, object]:
        (tmp_path / "k").mkdir()
        (tmp_path / "k" / "half").write_bytes(b"x")
        return {"notes": ["two"]}

    folder, content = cached("k", slow, root=tmp_path)
    assert read_entry(folder) == content == {"notes": ["two"]}
    assert list(tmp_path.iterdir()) == [folder]


def test_damage_is_said(tmp_path: Path) -> None:
    told: list[str] = []
    folder, _ = cached("k", Maker(), root=tmp_path, tell=told.append)
    assert not told
    (folder / "part" / "a.bin").write_bytes(b"")
    cached("k", Maker(), root=tmp_path, tell=told.append)
    assert "damaged" in told[0]


def test_what_a_killed_process_left_goes_and_what_a_living_one_makes_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = os.fork()
    if not pid:
        cached("killed", lambda folder: os.kill(os.getpid(), signal.SIGKILL) or {}, root=tmp_path)
    os.waitpid(pid, 0)
    (left,) = tmp_path.iterdir()
    cached("young", Maker(), root=tmp_path)
    assert left.is_dir()  # it might be so new that its maker has not locked it yet
    monkeypatch.setattr(cache, "UNLOCKED_SECONDS", -1)

    def beside(folder: Path) -> Mapping[str, object]:
        cached("other", Maker(), root=tmp_path)
        assert folder.is_dir()
        return {}

    cached("k", beside, root=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["k", "other", "young"]


def test_unfinished_work_waits_two_weeks_and_goes_with_the_entry(tmp_path: Path) -> None:
    week = time.time() - 7 * 86400
    for key in ("k", "old"):
        cache.unfinished_folder(tmp_path, key).mkdir()
    os.utime(cache.unfinished_folder(tmp_path, "old"), (week, week))
    cached("k", Maker(), root=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".tmp-old-chunks", "k"]
    os.utime(cache.unfinished_folder(tmp_path, "old"), (week - 8 * 86400, week - 8 * 86400))
    cached("other", Maker(), root=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["k", "other"]


def test_the_cache_is_its_owners_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        folder, _ = cached("k", Maker(), root=tmp_path / "tunesmith" / "prepared")
    finally:
        os.umask(before)
    assert folder.parent.stat().st_mode & 0o777 == folder.stat().st_mode & 0o777 == 0o700
