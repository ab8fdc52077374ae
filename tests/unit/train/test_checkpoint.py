from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from tunesmith.errors import ResourceError, ResumeError
from tunesmith.runs.inventory import digest
from tunesmith.train import checkpoint
from tunesmith.train.checkpoint import (
    MANIFEST,
    OBJECTIVE,
    OPTIMIZER,
    STATE,
    WEIGHTS,
    State,
    check_identity,
    find_problem,
    list_steps,
    load_checkpoint,
    load_newest,
    peek_state,
    remove_older,
    save_checkpoint,
)

FILES = (WEIGHTS, OPTIMIZER, STATE, MANIFEST)
FRESH = State(
    step=0,
    num_steps=200,
    best_step=None,
    best_loss=None,
    reference_mean=-1.5,
    threads=1,
    torch_version="2",
    identity={"stage.learning_rate": 0.1, "seed": 3},
)


def save(folder: Path, step: int) -> Path:
    folder.mkdir(exist_ok=True)
    weights = {"a": torch.full((2, 3), float(step)), "b": torch.tensor([0.1])}
    return save_checkpoint(
        folder, state=replace(FRESH, step=step), weights=weights, optimizer={"step.a": torch.tensor(1.0)}
    )


def truncate(share: float) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        data = path.read_bytes()
        path.write_bytes(data[: int(share * len(data))])

    return damage


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "deleted": Path.unlink,
    "empty": truncate(0.0),
    "half": truncate(0.5),
    "nearly whole": truncate(0.99),
    "one bit": flip,
}


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    path = save(tmp_path / "c", 7)
    loaded = load_checkpoint(path)
    assert loaded.state == replace(FRESH, step=7)
    assert loaded.weights["a"].tolist() == [[7.0] * 3] * 2
    assert loaded.weights["b"].equal(torch.tensor([0.1]))
    assert loaded.optimizer["step.a"].equal(torch.tensor(1.0))
    assert sorted(file.name for file in path.iterdir()) == sorted(FILES)


def test_what_a_method_carries_comes_back(tmp_path: Path) -> None:
    moving = {"moving": torch.tensor([0.25, -1.0])}
    state = replace(FRESH, step=7, carried={"mean": 0.1}, tensors=moving)
    save_checkpoint(tmp_path, state=state, weights={"a": torch.ones(2)}, optimizer={"s": torch.ones(1)})
    loaded = load_checkpoint(tmp_path / "step-7")
    assert loaded.state.carried == {"mean": 0.1}
    assert loaded.state.tensors["moving"].equal(moving["moving"])
    assert (tmp_path / "step-7" / OBJECTIVE).is_file()
    (tmp_path / "step-7" / OBJECTIVE).unlink()
    assert find_problem(tmp_path / "step-7") == f"{OBJECTIVE} is missing"


def test_updates_are_the_steps_without_the_skipped_ones() -> None:
    assert replace(FRESH, step=7, num_skipped=2).num_updates == 5


def test_no_checkpoint_is_no_error(tmp_path: Path) -> None:
    assert load_newest(tmp_path, warn=pytest.fail) is None


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_the_one_before_is_loaded(tmp_path: Path, name: str, damage: str) -> None:
    for step in (9, 10):
        save(tmp_path, step)
    DAMAGES[damage](tmp_path / "step-10" / name)
    warnings: list[str] = []
    loaded = load_newest(tmp_path, warn=warnings.append)
    assert loaded is not None
    assert loaded.state.step == 9
    assert len(warnings) == 1
    assert "step-10" in warnings[0]
    assert name in warnings[0]
    with pytest.raises(ResumeError, match=name.replace(".", r"\.")):
        load_checkpoint(tmp_path / "step-10")


@pytest.mark.parametrize("name", FILES)
def test_damage_of_the_only_one_is_refused(tmp_path: Path, name: str) -> None:
    save(tmp_path, 5)
    flip(tmp_path / "step-5" / name)
    with pytest.raises(ResumeError, match=name.replace(".", r"\.")) as caught:
        load_newest(tmp_path, warn=lambda text: None)
    assert caught.value.exit_code == 3
    assert (tmp_path / "step-5" / WEIGHTS).exists()


def test_every_bit_of_the_manifest_counts(tmp_path: Path) -> None:
    """A flipped bit gives another problem, or leaves the same content (white space as another white space)."""
    path = save(tmp_path, 1) / MANIFEST
    data = path.read_bytes()
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        problem = find_problem(tmp_path / "step-1")
        assert problem.startswith(MANIFEST) or (not problem and json.loads(changed) == json.loads(data))


def foreign_manifest(path: Path) -> None:
    (path / MANIFEST).write_text(json.dumps({"kind": "other", "layout": 1, "files": {}}))


def older_layout(path: Path) -> None:
    manifest = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps(manifest | {"layout": 0}))


def extra_file(path: Path) -> None:
    (path / "adapter_model.bin").write_bytes(b"x")


def link_to_a_file(path: Path) -> None:
    (path / WEIGHTS).rename(path.parent / "elsewhere")
    (path / WEIGHTS).symlink_to(path.parent / "elsewhere")


def link_to_a_folder(path: Path) -> None:
    path.rename(path.parent / "elsewhere")
    path.symlink_to(path.parent / "elsewhere")


def dangling_link(path: Path) -> None:
    shutil.rmtree(path)
    path.symlink_to(path.parent / "nothing")


def folder_in_place_of_a_file(path: Path) -> None:
    (path / WEIGHTS).unlink()
    (path / WEIGHTS).mkdir()


def another_step(path: Path) -> None:
    shutil.rmtree(path)
    shutil.copytree(path.parent / "step-9", path)


def signed_again(path: Path, name: str, content: bytes) -> None:
    """A file of another's making, with a manifest that agrees with it."""
    (path / name).write_bytes(content)
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (path / MANIFEST).write_text(json.dumps(manifest | {"files_sha256": digest(manifest["files"])}))


def state_with(path: Path, **changes: object) -> None:
    state = json.loads((path / STATE).read_text()) | changes
    signed_again(path, STATE, json.dumps(state).encode())


STRANGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "foreign": (foreign_manifest, "is not one of a checkpoint of Tunesmith"),
    "older layout": (older_layout, "is of layout 0, and this version of Tunesmith"),
    "extra file": (extra_file, "adapter_model.bin was added"),
    "file is a link": (link_to_a_file, f"{WEIGHTS} is a symbolic link"),
    "folder is a link": (link_to_a_folder, "is a symbolic link"),
    "dangling link": (dangling_link, "manifest.json is missing"),
    "folder for a file": (folder_in_place_of_a_file, f"{WEIGHTS} is missing"),
    "another step's": (another_step, f"{STATE} is of step 9"),
    "unknown state": (lambda path: state_with(path, momentum=1), "momentum, which this version"),
    "wrong type": (lambda path: state_with(path, step="10"), "holds '10' as step"),
    "deep": (lambda path: signed_again(path, STATE, b"[" * 200_000), "is nested more than 64 deep"),
    "no tensors": (lambda path: signed_again(path, WEIGHTS, b"not safetensors"), f"{WEIGHTS} holds no tensors"),
    "huge header": (lambda path: signed_again(path, OPTIMIZER, b"\xff" * 64), f"{OPTIMIZER} holds no tensors"),
}


@pytest.mark.parametrize("kind", STRANGE)
def test_strange_checkpoints_are_named_and_passed_over(tmp_path: Path, kind: str) -> None:
    for step in (9, 10):
        save(tmp_path, step)
    make, said = STRANGE[kind]
    make(tmp_path / "step-10")
    warnings: list[str] = []
    loaded = load_newest(tmp_path, warn=warnings.append)
    assert loaded is not None
    assert loaded.state.step == 9
    assert len(warnings) == 1
    assert said in warnings[0]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_strict_does_not_walk_back(tmp_path: Path, name: str, damage: str) -> None:
    for step in (9, 10):
        save(tmp_path, step)
    DAMAGES[damage](tmp_path / "step-10" / name)
    with pytest.raises(ResumeError, match=name.replace(".", r"\.")) as caught:
        load_newest(tmp_path, warn=pytest.fail, strict=True)
    assert caught.value.exit_code == 3
    assert caught.value.where.endswith("step-10")
    assert list_steps(tmp_path) == [9, 10]


def test_what_desktops_and_file_systems_put_beside_it_is_no_damage(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    for name in (".DS_Store", ".nfs0000000001", "Thumbs.db"):
        (path / name).write_bytes(b"x")
    assert find_problem(path) == ""


@pytest.mark.parametrize("seconds", [-86400.0, 0.0, 365 * 86400.0])
def test_steps_decide_which_is_newest_and_no_clock(tmp_path: Path, seconds: float) -> None:
    """F19: the clock was set back by a day, or forward by a year, between two saves."""
    for step in (9, 10):
        save(tmp_path, step)
    stamp = (tmp_path / "step-9").stat().st_mtime + seconds
    for path in ((tmp_path / "step-10").iterdir(), [tmp_path / "step-10"]):
        for each in path:
            os.utime(each, (stamp, stamp))
    loaded = load_newest(tmp_path, warn=pytest.fail)
    assert loaded is not None
    assert loaded.state.step == 10
    remove_older(tmp_path, newest=10, keep=1, best=None)
    assert list_steps(tmp_path) == [10]


def test_names_that_are_no_steps_are_left_alone(tmp_path: Path) -> None:
    save(tmp_path, 3)
    for name in ("step-", "step-007", "step-\u00b2", "step-4.old", "step--1"):
        (tmp_path / name).mkdir()
    assert list_steps(tmp_path) == [3]


def test_a_peek_reads_the_state_of_the_newest_and_no_tensor(tmp_path: Path) -> None:
    assert peek_state(tmp_path) is None
    for step in (9, 10):
        save(tmp_path, step)
    flip(tmp_path / "step-10" / WEIGHTS)
    state = peek_state(tmp_path)
    assert state is not None
    assert state.step == 10
    flip(tmp_path / "step-10" / STATE)
    state = peek_state(tmp_path)
    assert state is not None
    assert state.step == 9


def test_empty_newest_folder_does_not_win(tmp_path: Path) -> None:
    save(tmp_path, 10)
    (tmp_path / "step-20").mkdir()
    loaded = load_newest(tmp_path, warn=lambda text: None)
    assert loaded is not None
    assert loaded.state.step == 10


def test_files_swapped_between_checkpoints_are_seen(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    shutil.copy(tmp_path / "step-1" / WEIGHTS, tmp_path / "step-2" / WEIGHTS)
    assert "was altered" in find_problem(tmp_path / "step-2")


def test_manifest_cannot_point_elsewhere(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["files"]["../../other"] = manifest["files"][WEIGHTS]
    (path / MANIFEST).write_text(json.dumps(manifest))
    assert "is no name of a file in a folder" in find_problem(path)


@pytest.mark.parametrize("keep", [1, 2, 3])
@pytest.mark.parametrize("crossing", [10, 100])
def test_rotation_counts_in_numbers_not_letters(tmp_path: Path, keep: int, crossing: int) -> None:
    for step in range(crossing - 3, crossing + 2):
        save(tmp_path, step)
        remove_older(tmp_path, newest=step, keep=keep, best=None)
        assert list_steps(tmp_path) == list(range(max(crossing - 3, step - keep + 1), step + 1))
        assert find_problem(tmp_path / f"step-{step}") == ""


def test_rotation_spares_the_best_and_removes_damaged_newer_ones(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        save(tmp_path, step)
    (tmp_path / "step-99").mkdir()
    remove_older(tmp_path, newest=8, keep=1, best=4)
    assert list_steps(tmp_path) == [4, 8]


def test_saving_over_a_damaged_one_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 4)
    flip(tmp_path / "step-4" / WEIGHTS)
    save(tmp_path, 4)
    assert find_problem(tmp_path / "step-4") == ""
    assert [path.name for path in tmp_path.iterdir()] == ["step-4"]


def test_full_disk_is_seen_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    monkeypatch.setattr(checkpoint, "free_bytes", lambda path: 1000)
    # 2x3 + 1 + 1 numbers of 4 bytes and 1 MiB to spare
    with pytest.raises(ResourceError, match="needs 1,048,608 bytes and 1,000 are free") as caught:
        save(tmp_path, 2)
    assert caught.value.exit_code == 5
    assert list_steps(tmp_path) == [1]


def test_disk_that_fills_up_while_writing_leaves_nothing_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    def full(tensors: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(ResourceError, match="are free"):
        save(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    assert find_problem(tmp_path / "step-1") == ""


def test_another_stage_is_refused_field_by_field(tmp_path: Path) -> None:
    loaded = load_checkpoint(save(tmp_path, 1))
    check_identity(loaded, {"stage.learning_rate": 0.1, "seed": 3})
    with pytest.raises(ResumeError) as caught:
        check_identity(loaded, {"stage.learning_rate": 0.2, "seed": 3, "input.base": "x"})
    message = str(caught.value)
    assert "stage.learning_rate: 0.1 there, 0.2 now" in message
    assert "input.base: None there, 'x' now" in message
    assert "seed" not in message
