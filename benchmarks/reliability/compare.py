"""The same faults, done to Tunesmith, the Hugging Face Trainer and TRL, and what each of them does then.

    MODULE=benchmarks.reliability.compare bash benchmarks/bench.sh          installs TRL beside, once
    python -m benchmarks.reliability.compare [--peers-python PATH]          where it is installed

Every system trains the same tiny model for eight steps, a checkpoint every second one, with dropout. It is killed
behind step 5, so that the checkpoint of step 4 is its newest; then a copy of its folder is damaged, and it is started
again in the way that its documentation shows. Writes benchmarks/results/reliability.json, which docs/reliability.md
shows.

In: nothing. Out: the table. Must not know: how a system trains (the workers do).
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors.torch import load_file

from benchmarks.reliability.jobs import (
    ENDED,
    KILLED_AFTER,
    KILLED_IN_SAVE_OF,
    LOG,
    NUM_ROWS,
    WEIGHTS,
    Job,
    read_ended,
    write_jobs,
)

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks/results/reliability.json"
PEERS_PYTHON = ROOT / "benchmarks/.venv-bench/bin/python"
EMBEDDED = ROOT / "src/tunesmith/embedded/quickstart"
NEWEST, NEXT = 4, 6


@dataclass(frozen=True, slots=True)
class System:
    """Where a system keeps what."""

    name: str
    rows: str
    checkpoints: str
    prefix: str
    weights: str
    optimizer: str
    state: str
    ours: bool = False


def _ours(method: str, rows: str) -> System:
    names = ("trainable.safetensors", "optimizer.safetensors", "state.json")
    return System(f"Tunesmith {method}", rows, "runs/run/stages/only/checkpoints", "step-", *names, ours=True)


def _peer(name: str, rows: str) -> System:
    return System(name, rows, "out", "checkpoint-", "adapter_model.safetensors", "optimizer.pt", "trainer_state.json")


SYSTEMS = [
    _ours("SFT", "sft.jsonl.gz"),
    _ours("DPO", "preferences.jsonl.gz"),
    _peer("HF Trainer", "sft.jsonl.gz"),
    _peer("TRL SFT", "sft.jsonl.gz"),
    _peer("TRL DPO", "preferences.jsonl.gz"),
]


@dataclass(frozen=True, slots=True)
class Place:
    """A copy of a broken-off training that a fault is done to."""

    system: System
    folder: Path

    def checkpoint(self, step: int = NEWEST) -> Path:
        """The folder of a checkpoint."""
        return self.folder / self.system.checkpoints / f"{self.system.prefix}{step}"


@dataclass(frozen=True, slots=True)
class Fault:
    """damage: what is done to the copy; learning_rate: with which it is started again; broken: how it was stopped."""

    name: str
    damage: Callable[[Place], None] = lambda place: None
    learning_rate: float | None = None
    in_save: bool = False
    changes_inputs: bool = False


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2 + 3 - (len(data) // 2) % 4] ^= 0x40  # a high bit of a number's exponent
    path.write_bytes(data)


def _cut(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def _change_rows(place: Place) -> None:
    """Every second row becomes the row before it."""
    path = place.folder / "rows.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("".join(line + "\n" for line in lines[::2] for _ in range(2)))


FAULTS = [
    Fault("none: killed behind step 5"),
    Fault("optimizer file missing", lambda place: (place.checkpoint() / place.system.optimizer).unlink()),
    Fault("one bit of the weights flipped", lambda place: _flip(place.checkpoint() / place.system.weights)),
    Fault("weights cut to half", lambda place: _cut(place.checkpoint() / place.system.weights)),
    Fault("state file cut to half", lambda place: _cut(place.checkpoint() / place.system.state)),
    Fault("newest checkpoint folder is empty", lambda place: place.checkpoint(NEXT).mkdir()),
    Fault("killed in a save, behind the weights", in_save=True),
    Fault("every second row of the data replaced", _change_rows, changes_inputs=True),
    Fault("learning rate ten times as high", learning_rate=1e-2, changes_inputs=True),
]


def run_system_jobs(jobs: list[Job], *, ours: bool, python: Path, work: Path) -> None:
    """All jobs of one environment in one process, which forks."""
    path = work / "jobs.json"
    write_jobs(path, jobs)
    module = "benchmarks.reliability.worker_tunesmith" if ours else "benchmarks.reliability.worker_peers"
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    variables |= {"PYTHONPATH": f"{ROOT}/src:{ROOT}" if ours else str(ROOT), "HF_HOME": str(work / "hf")}
    variables |= {"XDG_CACHE_HOME": str(work / "caches")}
    command = [sys.executable if ours else str(python), "-m", module, str(path)]
    subprocess.run(command, cwd=ROOT, env=variables, check=True)


def measure(systems: list[System], *, python: Path, work: Path) -> dict[tuple[str, str], str]:
    """What came out, by system and fault: first every system unbroken and broken off, then every fault's copy."""
    model = str(EMBEDDED / "model")

    def job(system: System, name: str) -> Job:
        return Job(system.name, str(work / system.name / name), model)

    starts = []
    for system in systems:
        for name in ("whole", "broken", "broken in a save"):
            folder = work / system.name / name
            folder.mkdir(parents=True)
            lines = gzip.decompress((EMBEDDED / system.rows).read_bytes()).splitlines(keepends=True)
            (folder / "rows.jsonl").write_bytes(b"".join(lines[:NUM_ROWS]))
        starts.append(job(system, "whole"))
        starts.append(replace(job(system, "broken"), killed_after=KILLED_AFTER))
        starts.append(replace(job(system, "broken in a save"), killed_in_save=KILLED_IN_SAVE_OF))
    resumes = []
    for system in systems:
        for fault in FAULTS:
            again = replace(job(system, fault.name), resume=True)
            resumes.append(again if fault.learning_rate is None else replace(again, learning_rate=fault.learning_rate))
    for ours in (True, False):
        names = {system.name for system in systems if system.ours == ours}
        run_system_jobs([each for each in starts if each.system in names], ours=ours, python=python, work=work)
        for system in (each for each in systems if each.ours == ours):
            for fault in FAULTS:
                _copy_and_damage(work, system, fault)
        run_system_jobs([each for each in resumes if each.system in names], ours=ours, python=python, work=work)
    return {(system.name, fault.name): outcome(work, system, fault) for system in systems for fault in FAULTS}


def _copy_and_damage(work: Path, system: System, fault: Fault) -> None:
    broken = work / system.name / ("broken in a save" if fault.in_save else "broken")
    assert read_ended(broken).code == -9, f"{broken} was not killed:\n{(broken / LOG).read_text()}"
    folder = work / system.name / fault.name
    shutil.copytree(broken, folder)
    for name in ("first_step", ENDED, LOG):  # of the start that was broken off
        (folder / name).unlink(missing_ok=True)
    fault.damage(Place(system, folder))


def outcome(work: Path, system: System, fault: Fault) -> str:
    """A cell of the table."""
    folder, whole = work / system.name / fault.name, work / system.name / "whole"
    ended = read_ended(folder)
    if ended.code:
        return _refusal((folder / LOG).read_text(errors="replace"), ended.code)
    difference = _difference(folder / WEIGHTS, whole / WEIGHTS)
    told = _told(folder / LOG, work / system.name / FAULTS[0].name / LOG) if fault is not FAULTS[0] else ""
    begin = f"goes on from step {ended.first_step}" + (f", saying: {told}" if told else "")
    if not told and (difference or fault.changes_inputs):
        begin += " without a word"
    if fault.changes_inputs:
        return f"{begin}; " + ("the change has no effect" if difference == 0 else "weights of a mixture at the end")
    return f"{begin}; " + (
        "the same weights at the end" if difference == 0 else f"other weights at the end (by up to {difference:.1g})"
    )


def _refusal(log: str, code: int) -> str:
    """The error's own line, and whether it is a message or a traceback."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    if "Traceback (most recent call last)" in log:
        last = next(
            (line for line in reversed(lines) if re.match(r"^[\w.]+(Error|Exception|Interrupt)\b", line)), lines[-1]
        )
        return f"stops with a traceback: {_short(last)}"
    start = next((index for index, line in enumerate(lines) if line.startswith("Error: ")), len(lines) - 1)
    return f"stops with exit code {code}: {_short(' '.join(lines[start : start + 3]).removeprefix('Error: '))}"


def _told(log: Path, control: Path) -> str:
    """The first line about it that a resume without the fault does not say; numbers and paths aside."""
    known = {_pattern(line) for line in control.read_text(errors="replace").splitlines()}
    words = re.compile(
        r"checkpoint|optimizer|state|weights|missing|altered|changed|rows|warn|learning rate", re.IGNORECASE
    )
    lines = log.read_text(errors="replace").splitlines()
    fresh = [line for line in lines if words.search(line) and _pattern(line) not in known and "{'loss'" not in line]
    return _short(fresh[0].strip()) if fresh else ""


def _pattern(line: str) -> str:
    return re.sub(r"[0-9.e+-]+|/\S+", "#", line)


def _short(text: str) -> str:
    """Without this machine's paths."""
    text = re.sub(r"(/\S+/)?(runs/run/stages/only/checkpoints|out)/", "", text)
    text = re.sub(r"/\S+/", "", text)
    return f"“{text[:220]}{'…' if len(text) > 220 else ''}”"


def _difference(one: Path, other: Path) -> float:
    first, second = load_file(one), load_file(other)
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().nan_to_num(float("inf")).max()) for name in first)


def versions(python: Path) -> dict[str, str]:
    """Of what was compared."""
    code = "import trl, transformers, torch, peft; print(trl.__version__, transformers.__version__, torch.__version__)"
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True)
    names = ("TRL", "transformers", "torch")
    return dict(zip(names, done.stdout.splitlines()[-1].split(), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers-python", type=Path, default=PEERS_PYTHON)
    parser.add_argument("--systems", nargs="*", help="only these")
    parser.add_argument("--work", type=Path, help="keep the work folder here")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    systems = [system for system in SYSTEMS if not given.systems or system.name in given.systems]
    with tempfile.TemporaryDirectory() as scratch:
        work = (given.work or Path(scratch)).absolute()
        found = measure(systems, python=given.peers_python, work=work)
    content = {
        "versions": versions(given.peers_python),
        "systems": [system.name for system in systems],
        "faults": [
            {"fault": fault.name, "outcomes": {system.name: found[system.name, fault.name] for system in systems}}
            for fault in FAULTS
        ],
    }
    given.out.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    print(json.dumps(content, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
