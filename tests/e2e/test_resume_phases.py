"""Killed or stopped while rows are prepared or the reference is scored, a run goes on there, to the same bytes.

Every start is a process of its own (a fork of this one); R1, R2, F1, F16, F33, F42.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

import tunesmith
from tests.support.folders import make_model_folder, pairs, tiny_recipe, write_rows
from tunesmith.data import kept, reading
from tunesmith.data.sources import OpenedSource
from tunesmith.engine import reference, reference_parts, scoring
from tunesmith.errors import StoppedError, TunesmithError

DONE, FAILED = 0, 1
Hook = Callable[[], None]


@dataclass(frozen=True)
class Start:
    """How a start of the run ended: exit code or -signal, and what was said."""

    code: int
    notes: str


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    make_model_folder(folder / "model")
    write_rows(folder / "pairs.jsonl", pairs(16))
    write_rows(folder / "heldout.jsonl", [{**row, "prompt": f"And {row['prompt']}"} for row in pairs(4)])
    return folder


@pytest.fixture(scope="module")
def whole(inputs: Path) -> dict[str, bytes]:
    """What an unbroken run ends in."""
    assert start(inputs, "whole").code == DONE
    return ends(inputs / "whole")


def start(inputs: Path, name: str, hook: Hook = lambda: None) -> Start:
    """The same command, in a process of its own, with caches of its own name."""
    root = inputs / name
    root.mkdir(exist_ok=True)
    pid = os.fork()
    if not pid:
        try:
            os._exit(_run(inputs, root, hook))
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(FAILED)
    _, status = os.waitpid(pid, 0)
    notes = root / "notes"
    return Start(os.waitstatus_to_exitcode(status), notes.read_text() if notes.is_file() else "")


def _run(inputs: Path, root: Path, hook: Hook) -> int:
    """In the child: chunks of two rows and a part a forest, where a real run has a thousand and half a minute."""
    os.environ["XDG_CACHE_HOME"] = str(root / "cache")
    real = OpenedSource.raw_chunks
    OpenedSource.raw_chunks = lambda self, num_rows=2: real(self, num_rows)  # type: ignore[method-assign]
    reading.KEPT_BYTES = 0
    reference_parts.PART_SECONDS = 0.0
    hook()
    recipe = tiny_recipe(inputs, runs_folder=str(root / "runs"))
    stages = recipe["stages"]
    assert isinstance(stages, list)
    recipe["stages"] = [stages[1] | {"forest_tokens": 128, "save_every": 2}]
    sys.stderr = sys.stdout = (root / "notes").open("w", buffering=1)
    try:
        tunesmith.run(recipe)
    except StoppedError as error:
        return 128 + error.signal_number
    except TunesmithError as error:
        print(error)
        return error.exit_code
    return DONE


def ends(root: Path) -> dict[str, bytes]:
    """The bytes that must be the same: weights, optimizer, metrics, evaluation, what became of every row."""
    stage = root / "runs/tiny/stages/dpo"
    files = [*stage.rglob("*.safetensors"), stage / "metrics.jsonl", stage / "eval.jsonl"]
    found = {path.relative_to(root).as_posix(): path.read_bytes() for path in files}
    assert len(found) >= 6
    left = [path.name for path in (root / "cache/tunesmith/prepared").iterdir()]
    (name,) = [name for name in left if not name.startswith(".tmp-") or name.endswith("-chunks")]
    entry = root / "cache/tunesmith/prepared" / name
    found |= {path.relative_to(entry).as_posix(): path.read_bytes() for path in entry.rglob("*") if path.is_file()}
    (scores,) = (root / "cache/tunesmith/reference").iterdir()
    return found | {"reference": scores.read_bytes()}


def at_call(module: object, name: str, number: int, act: Callable[[], object], *, before: bool) -> Hook:
    """A hook that acts around a call of a function."""

    def hook() -> None:
        real = getattr(module, name)
        calls = iter(range(1000))

        def wrapped(*args: object, **kwargs: object) -> object:
            now = next(calls) == number
            if now and before:
                act()
            result = real(*args, **kwargs)
            if now and not before:
                act()
            return result

        setattr(module, name, wrapped)

    return hook


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


PREPARING = "earlier start prepared"
SCORING = "going on behind"
CASES = {
    "preparation, before a chunk is kept": (at_call(kept, "_write", 3, kill, before=True), -9, PREPARING),
    "preparation, behind the last chunk": (at_call(kept, "_write", 9, kill, before=False), -9, PREPARING),
    "preparation, stopped": (at_call(kept, "_write", 2, stop, before=False), 143, PREPARING),
    "reference, in a forest": (at_call(scoring, "_values", 3, kill, before=True), -9, SCORING),
    "reference, before a part is there": (at_call(reference_parts, "write_bytes", 2, kill, before=True), -9, SCORING),
    "reference, stopped": (at_call(scoring, "_values", 2, stop, before=False), 143, SCORING),
    "reference, before the whole": (at_call(reference, "write_bytes", 0, kill, before=True), -9, SCORING),
    "reference, behind the whole": (at_call(reference, "write_bytes", 0, kill, before=False), -9, "from the cache"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_broken_run_goes_on_where_it_stopped(inputs: Path, whole: dict[str, bytes], case: str) -> None:
    hook, code, note = CASES[case]
    name = case.replace(" ", "-").replace(",", "")
    first = start(inputs, name, hook)
    assert first.code == code, first.notes
    second = start(inputs, name)
    assert second.code == DONE, second.notes
    assert note in " ".join(second.notes.split())
    found = ends(inputs / name)
    assert sorted(found) == sorted(whole)
    assert [key for key in whole if found[key] != whole[key]] == []


def test_two_runs_at_once_share_their_caches(inputs: Path, whole: dict[str, bytes]) -> None:
    """Two commands at the same instant: each ends in the same bytes as alone."""
    (inputs / "shared").mkdir()
    pids = []
    for name in ("one", "two"):
        root = inputs / name
        root.mkdir()
        (root / "cache").symlink_to(inputs / "shared")
        pid = os.fork()
        if not pid:
            try:
                os._exit(_run(inputs, root, lambda: None))
            except BaseException as error:
                print(repr(error), file=sys.stderr, flush=True)
                os._exit(FAILED)
        pids.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    assert codes == [DONE, DONE], (inputs / "one/notes").read_text() + (inputs / "two/notes").read_text()
    assert ends(inputs / "one") == ends(inputs / "two") == whole
