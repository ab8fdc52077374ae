"""Checkpoints: what a stage needs to go on as if it had never stopped, complete or absent.

In: trained weights and optimizer state as named tensors, and the loop's state as plain values. Out: `step-N` folders,
and the same again from the newest one that is whole. Must not know: models, objectives, what a step does.

Order of a save: temporary folder, safetensors and JSON, a manifest of names, sizes and sha256 last, all fsynced,
renamed into place, read back and verified, and only then are older ones removed. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tunesmith.errors import ResourceError, ResumeError
from tunesmith.runs.atomic import free_bytes, publish_folder, remove_folder, sha256_file, write_json

WEIGHTS = "trainable.safetensors"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
MANIFEST = "manifest.json"

KIND = "tunesmith-checkpoint"
LAYOUT = 1

_SPARE_BYTES = 1 << 20
"""Room for JSON and file system overhead, beside the tensors."""

Identity = dict[str, object]
"""Plain JSON values that must be equal for a checkpoint to belong to a stage."""


@dataclass(frozen=True, slots=True)
class State:
    """The loop's own state. There is no sampler and no generator in it: those are functions of the step.

    num_skipped: steps without an update, of all steps; skips_in_row: of the last ones; scaler: the loss scale's own
    state. They are of float16 alone, and absent from checkpoints that were made before it.
    """

    step: int
    num_steps: int
    best_step: int | None
    best_loss: float | None
    reference_mean: float | None
    threads: int
    torch_version: str
    identity: Identity
    num_skipped: int = 0
    skips_in_row: int = 0
    scaler: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """A checkpoint that was read and verified."""

    path: Path
    state: State
    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]


def list_steps(folder: Path) -> list[int]:
    """Steps that have a checkpoint folder, whole or not, in the order of numbers."""
    names = [path.name.removeprefix("step-") for path in folder.glob("step-*") if path.is_dir()]
    return sorted(int(name) for name in names if name.isdigit())


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies."""
    return folder / f"step-{step}"


def save_checkpoint(
    folder: Path, *, state: State, weights: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]
) -> Path:
    """Save and verify one checkpoint; raises ResourceError (5) where the disk is full, and leaves nothing then."""
    target = path_of(folder, state.step)
    need = _SPARE_BYTES + sum(t.numel() * t.element_size() for t in (*weights.values(), *optimizer.values()))
    if free_bytes(folder) < need:
        raise _disk_full(target, need)
    with publish_folder(target) as temporary:
        try:
            save_file({name: tensor.detach() for name, tensor in weights.items()}, temporary / WEIGHTS)
            save_file(dict(optimizer), temporary / OPTIMIZER)
        except SafetensorError as error:  # it wraps what the disk said
            if "os error 28" in str(error) or "os error 122" in str(error):
                raise _disk_full(target, need) from error
            raise
        write_json(temporary / STATE, asdict(state))
        files = {name: _describe(temporary / name) for name in (WEIGHTS, OPTIMIZER, STATE)}
        write_json(temporary / MANIFEST, {"kind": KIND, "layout": LAYOUT, "files": files})
    problem = find_problem(target)
    if problem:
        raise ResourceError(f"what was written cannot be read back: {problem}", where=str(target))
    return target


def remove_older(folder: Path, *, newest: int, keep: int, best: int | None) -> None:
    """Remove all but the `keep` newest checkpoints and the best one, after `newest` was saved and verified.

    Folders with a higher number than `newest` go too: the run walked back over them because they are damaged.
    """
    steps = list_steps(folder)
    kept = {step for step in steps if step <= newest and step in steps[: steps.index(newest) + 1][-keep:]}
    for step in steps:
        if step not in kept and step != best:
            remove_folder(path_of(folder, step))


def find_problem(path: Path) -> str:
    """What is wrong with the checkpoint at `path`, naming the file; empty where every byte is as it was written."""
    try:
        manifest = json.loads((path / MANIFEST).read_text("utf-8"))
        files = dict(manifest["files"])
        expected = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
        known = (manifest["kind"], manifest["layout"]) == (KIND, LAYOUT)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__})"
    if not known or set(expected) != {WEIGHTS, OPTIMIZER, STATE}:
        return f"{MANIFEST} is not one of this version"
    for name, (size, sha) in expected.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size:,} bytes, not {size:,}"
        if sha256_file(file) != sha:
            return f"{name} was altered: its sha256 is not the one in {MANIFEST}"
    return ""


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a verified checkpoint; raises ResumeError (3), naming the file, where it is not whole."""
    problem = find_problem(path)
    if problem:
        raise ResumeError(problem + ".", where=str(path))
    state = State(**json.loads((path / STATE).read_text("utf-8")))
    return Checkpoint(path, state, load_file(path / WEIGHTS), load_file(path / OPTIMIZER))


def load_newest(folder: Path, *, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest whole checkpoint, with a warning for each damaged one that is newer; None where there never was one.

    Raises ResumeError where there are checkpoints and none of them is whole: a fresh start would hide the loss.
    """
    problems: list[str] = []
    for step in reversed(list_steps(folder)):
        path = path_of(folder, step)
        problem = find_problem(path)
        if not problem:
            return load_checkpoint(path)
        problems.append(f"{path}: {problem}")
        warn(f"Checkpoint {problems[-1]}; going back to an older one.")
    if problems:
        remedy = "Restore one of them from a copy, or delete the stage's folder to train it again from its start."
        raise ResumeError("no checkpoint is whole:\n  " + "\n  ".join(problems), where=str(folder), remedy=remedy)
    return None


def check_identity(checkpoint: Checkpoint, identity: Identity) -> None:
    """Refuse, field by field, a checkpoint that another recipe, model or data made: ResumeError (3)."""
    saved = checkpoint.state.identity
    names = sorted(saved.keys() | identity.keys())
    different = [name for name in names if saved.get(name) != identity.get(name)]
    if different:
        lines = [f"  {name}: {saved.get(name)!r} there, {identity.get(name)!r} now" for name in different]
        remedy = "Nothing was changed. Undo the change, or give the run another name."
        what = "the checkpoint belongs to another stage:\n" + "\n".join(lines)
        raise ResumeError(what, where=str(checkpoint.path), remedy=remedy)


def _describe(path: Path) -> dict[str, object]:
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def _disk_full(target: Path, need: int) -> ResourceError:
    free = free_bytes(target)
    remedy = "The checkpoint before it is untouched. Make room and run again, or lower `keep_checkpoints`."
    return ResourceError(
        f"the checkpoint needs {need:,} bytes and {free:,} are free.", where=str(target), remedy=remedy
    )
