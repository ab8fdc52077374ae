"""Checkpoints: what a stage needs to go on as if it had never stopped, complete or absent.

In: trained weights, optimizer state and what a method carries as named tensors, and the loop's state as plain values.
Out: `step-N` folders, and the same again from the newest one that is whole. Must not know: models, objectives, what a
step does.

Order of a save: temporary folder, safetensors and JSON, a manifest of names, sizes and sha256 last, all fsynced,
renamed into place, read back and verified, and only then are older ones removed. Nothing is ever unpickled.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from json import JSONDecodeError
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tunesmith.errors import ResourceError, ResumeError
from tunesmith.runs.atomic import publish_folder, remove_folder, write_json
from tunesmith.runs.disk import free_bytes
from tunesmith.runs.inventory import Inventory, digest, find_change, read_inventory, read_object, take_inventory
from tunesmith.version import VERSION

WEIGHTS = "trainable.safetensors"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
OBJECTIVE = "objective.safetensors"
"""Of methods that carry tensors from step to step; the others have no such file."""
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
    state. asked_tokens, forest_tokens, tree_tokens: the size of micro-batches that the stage began with, and what it
    was lowered to; checkpointing: what is recomputed; attention: the kernel. Sums are rounded in an order that these
    and `threads` decide, so a stage goes on with the same. best_loss: the stage's `best_metric` at its best step, which
    was the loss once; improved_loss, num_unimproved: the same where it last improved, and evaluations since. carried,
    tensors: what the method carries beside the weights (`tensors` in a file of its own). What has a default is absent
    from checkpoints that were made before it.
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
    num_nonfinite: int = 0
    asked_tokens: int | None = None
    forest_tokens: int | None = None
    tree_tokens: int | None = None
    checkpointing: str | None = None
    attention: str | None = None
    tunesmith_version: str | None = None
    carried: dict[str, float] = field(default_factory=dict)
    improved_loss: float | None = None
    num_unimproved: int = 0
    tensors: Mapping[str, Tensor] = field(default_factory=dict, compare=False, repr=False)

    @property
    def num_updates(self) -> int:
        """Updates that were applied to the weights; the schedule counts these."""
        return self.step - self.num_skipped


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """A checkpoint that was read and verified."""

    path: Path
    state: State
    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]


def list_steps(folder: Path) -> list[int]:
    """Steps that have a checkpoint folder, whole or not, in the order of numbers: names and clocks may lie."""
    names = [path.name.removeprefix("step-") for path in folder.glob("step-*") if path.is_dir() or path.is_symlink()]
    return sorted(int(name) for name in names if name.isdecimal() and name == str(int(name)))


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies."""
    return folder / f"step-{step}"


def save_checkpoint(
    folder: Path, *, state: State, weights: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]
) -> Path:
    """Save and verify one checkpoint; raises ResourceError (5) where the disk is full, and leaves nothing then."""
    target = path_of(folder, state.step)
    files = {WEIGHTS: weights, OPTIMIZER: optimizer} | ({OBJECTIVE: state.tensors} if state.tensors else {})
    need = _SPARE_BYTES + sum(t.numel() * t.element_size() for tensors in files.values() for t in tensors.values())
    if free_bytes(folder) < need:
        raise _disk_full(target, need)
    with publish_folder(target, need_bytes=need) as temporary:
        for name, tensors in files.items():
            save_file({key: tensor.detach().contiguous() for key, tensor in tensors.items()}, temporary / name)
        values = asdict(replace(state, tensors={}))
        del values["tensors"]
        write_json(temporary / STATE, values)
        inventory = take_inventory(temporary)
        manifest = {"kind": KIND, "layout": LAYOUT, "files": inventory, "files_sha256": digest(inventory)}
        write_json(temporary / MANIFEST, manifest)
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
        files = _read_manifest(path)
    except (OSError, ValueError) as error:
        return f"{MANIFEST} {_reason(error)}"
    change = find_change(path, files, beside=frozenset({MANIFEST}))
    if change:
        return change
    try:
        state = _read_state(path)
    except (OSError, ValueError) as error:
        return f"{STATE} {_reason(error)}"
    return "" if path.name == f"step-{state.step}" else f"{STATE} is of step {state.step}"


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a verified checkpoint; raises ResumeError (3), naming the file, where it is not whole."""
    problem = find_problem(path)
    if problem:
        raise ResumeError(problem + ".", where=str(path))
    state = _read_state(path)
    tensors: dict[str, dict[str, Tensor]] = {OBJECTIVE: {}}
    for name in (WEIGHTS, OPTIMIZER, OBJECTIVE):
        if name == OBJECTIVE and not (path / name).exists():
            continue
        try:
            tensors[name] = load_file(path / name)
        except (SafetensorError, OSError, ValueError) as error:  # its manifest was made by another
            raise ResumeError(f"{name} holds no tensors ({error}).", where=str(path)) from error
    return Checkpoint(path, replace(state, tensors=tensors[OBJECTIVE]), tensors[WEIGHTS], tensors[OPTIMIZER])


def load_newest(folder: Path, *, warn: Callable[[str], None], strict: bool = False) -> Checkpoint | None:
    """The newest whole checkpoint, with a warning for each damaged one that is newer; None where there never was one.

    Raises ResumeError where there are checkpoints and none of them is whole: a fresh start would hide the loss. With
    `strict` it is raised for the first damaged one.
    """
    problems: list[str] = []
    for step in reversed(list_steps(folder)):
        try:
            return load_checkpoint(path_of(folder, step))
        except ResumeError as error:
            problems.append(f"{error.where}: {error.what}")
            if strict:
                remedy = "Nothing was changed. Without `--strict` the run goes back to the newest whole checkpoint."
                raise ResumeError(error.what, where=error.where, remedy=remedy) from error
        warn(f"Checkpoint {problems[-1]} Going back to an older one; its steps are trained again.")
    if problems:
        remedy = "Restore one of them from a copy, or delete the stage's folder to train it again from its start."
        raise ResumeError("no checkpoint is whole:\n  " + "\n  ".join(problems), where=str(folder), remedy=remedy)
    return None


def peek_state(folder: Path) -> State | None:
    """The state of the newest checkpoint whose state can be read, without its tensors: what the stage runs with has to
    be known before there is a model to put them in. Whether the checkpoint is whole, `load_newest` says."""
    for step in reversed(list_steps(folder)):
        path = path_of(folder, step)
        try:
            files = {STATE: _read_manifest(path)[STATE]}
            if not find_change(path, files, beside=frozenset({MANIFEST, WEIGHTS, OPTIMIZER, OBJECTIVE})):
                return _read_state(path)
        except (OSError, ValueError):
            continue
    return None


def _read_manifest(path: Path) -> Inventory:
    """The files that the checkpoint is made of. Raises OSError or ValueError, which say what is wrong with it."""
    manifest = read_object(path / MANIFEST)
    kind, layout = manifest.get("kind"), manifest.get("layout")
    if kind != KIND:
        raise ValueError("is not one of a checkpoint of Tunesmith")
    if layout != LAYOUT:
        raise ValueError(f"is of layout {layout!r}, and this version of Tunesmith ({VERSION}) reads layout {LAYOUT}")
    files = read_inventory(manifest.get("files"))
    missing = {WEIGHTS, OPTIMIZER, STATE} - files.keys()
    unknown = files.keys() - {WEIGHTS, OPTIMIZER, STATE, OBJECTIVE}
    if missing or unknown or manifest.keys() - {"files_sha256"} != {"kind", "layout", "files"}:
        raise ValueError("does not name the files of a checkpoint")
    if manifest.get("files_sha256", digest(files)) != digest(files):  # the first checkpoints had none
        raise ValueError("was altered")
    return files


def _read_state(path: Path) -> State:
    """The loop's state, without tensors. Raises OSError or ValueError, which say what is wrong with the file."""
    values = read_object(path / STATE)
    hints = {name: hint for name, hint in get_type_hints(State).items() if name != "tensors"}
    unknown = sorted(values.keys() - hints.keys())
    if unknown:
        raise ValueError(f"holds {unknown[0]}, which this version of Tunesmith ({VERSION}) does not know")
    needed = {each.name for each in fields(State) if each.default is MISSING and each.default_factory is MISSING}
    missing = sorted(needed - values.keys())
    if missing:
        raise ValueError(f"has no {missing[0]}")
    wrong = [name for name, value in values.items() if not _is_a(value, hints[name])]
    if wrong:
        raise ValueError(f"holds {values[wrong[0]]!r} as {wrong[0]}")
    return State(**values)  # type: ignore[arg-type]  # checked just now


def _is_a(value: object, hint: object) -> bool:
    """Whether a value from JSON is of a type as `State` names them: plain ones, unions, dictionaries by text."""
    if isinstance(hint, types.UnionType):
        return any(_is_a(value, each) for each in get_args(hint))
    if get_origin(hint) is dict:
        return isinstance(value, dict) and all(_is_a(each, get_args(hint)[1]) for each in value.values())
    if hint is float:  # a whole number is written without a point: the loss scale counts its steps in one
        return type(value) in (int, float)
    return hint is object or type(value) is hint


def _reason(error: OSError | ValueError) -> str:
    if isinstance(error, FileNotFoundError):
        return "is missing"
    if isinstance(error, OSError):
        return f"cannot be read ({error.strerror})"
    return "is not JSON" if isinstance(error, UnicodeDecodeError | JSONDecodeError) else str(error)


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


def _disk_full(target: Path, need: int) -> ResourceError:
    free = free_bytes(target)
    remedy = "The checkpoint before it is untouched. Make room and run again, or lower `keep_checkpoints`."
    return ResourceError(
        f"the checkpoint needs {need:,} bytes and {free:,} are free.", where=str(target), remedy=remedy
    )
