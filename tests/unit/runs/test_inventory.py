from __future__ import annotations

import json
from pathlib import Path

import pytest

from tunesmith.runs.inventory import digest, find_change, read_inventory, read_object, take_inventory

NONE: frozenset[str] = frozenset()


def make(folder: Path) -> Path:
    (folder / "below").mkdir(parents=True)
    (folder / "a.json").write_bytes(b"abc")
    (folder / "below" / "b").write_bytes(b"")
    return folder


def test_size_and_hash_of_every_file(tmp_path: Path) -> None:
    assert take_inventory(make(tmp_path / "x")) == {
        "a.json": {"bytes": 3, "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"},
        "below/b": {"bytes": 0, "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"},
    }


def test_nothing_changed(tmp_path: Path) -> None:
    folder = make(tmp_path / "x")
    assert find_change(folder, take_inventory(folder), beside=NONE) == ""


def test_every_change_is_named(tmp_path: Path) -> None:
    folder = make(tmp_path / "x")
    inventory = take_inventory(folder)
    (folder / "a.json").write_bytes(b"abd")
    assert find_change(folder, inventory, beside=NONE).startswith("a.json was altered")
    (folder / "a.json").write_bytes(b"ab")
    assert find_change(folder, inventory, beside=NONE) == "a.json has 2 bytes, not 3"
    (folder / "a.json").unlink()
    assert find_change(folder, inventory, beside=NONE) == "a.json is missing"
    (folder / "a.json").symlink_to(folder / "below" / "b")
    assert find_change(folder, inventory, beside=NONE) == "a.json is a symbolic link"
    (folder / "a.json").unlink()
    (folder / "a.json").write_bytes(b"abc")
    (folder / "below" / "c").write_bytes(b"")
    assert find_change(folder, inventory, beside=NONE).startswith("below/c was added")
    assert find_change(folder, inventory, beside=frozenset({"below/c"})) == ""
    (folder / "below" / "c").unlink()
    (folder / "linked").symlink_to(tmp_path)
    assert find_change(folder, inventory, beside=NONE).startswith("linked was added")


def test_a_card_and_a_desktop_s_file_are_nobody_s_input(tmp_path: Path) -> None:
    folder = make(tmp_path / "x")
    (folder / "README.md").write_text("before")
    inventory = take_inventory(folder)
    (folder / "README.md").write_text("after")
    (folder / ".DS_Store").write_bytes(b"x")
    assert find_change(folder, inventory, beside=NONE) == ""


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a//b", "", ".", "a/../b", "a\\b", "a\0b"])
def test_names_that_lead_out_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="is no name of a file in a folder"):
        read_inventory({name: {"bytes": 1, "sha256": "x"}})


@pytest.mark.parametrize("value", [None, [], {"a": 1}, {"a": {"bytes": 1}}, {"a": {"bytes": True, "sha256": "x"}}])
def test_what_is_no_inventory_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"no files are named|has no size and hash"):
        read_inventory(value)


def test_the_digest_does_not_depend_on_the_order() -> None:
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})


def test_only_objects_of_a_bounded_size_and_depth_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"a": 1}))
    assert read_object(path) == {"a": 1}
    for text in ("[1]", "{", "[" * 100_000, '{"a":"' + "x" * (17 << 20) + '"}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"JSON|deep|more than|Expecting"):
            read_object(path)
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(ValueError, match="symbolic link"):
        read_object(tmp_path / "link")
