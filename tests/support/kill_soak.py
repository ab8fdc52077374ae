"""Kills real runs again and again, at instants drawn over their life, and starts the same command again: R2, F1 to F3.

    python -m tests.support.kill_soak --kills 200 --seed 1

A run is `tunesmith run` with two stages (SFT, then DPO with a reference) on the embedded tiny model. The run that is
never killed is a command of its own; the killed ones are forks of this process, which has imported everything and done
nothing with it, so that a start costs no ten seconds of imports. After some kills a run is let to its end, and every
byte that it made is compared. Prints one JSON object; exits 1 where anything differs or was lost.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

import tunesmith
import tunesmith.pipeline.run
from tunesmith.cli.main import main as tunesmith_main
from tunesmith.train.checkpoint import find_problem, list_steps, path_of

SAVE_EVERY = 2
KILLS_A_LIFE = 10
LONGEST_SECONDS = 120.0
POLL_SECONDS = 0.0002
STAGES = ("sft", "dpo")
TARGETS = {"save": 0.5, "preparation": 0.08, "start": 0.08, "reference": 0.12, "training": 0.1, "result": 0.12}
"""Where a kill is aimed at; where it fell is read from what the dead process left."""


@dataclass
class Report:
    """What came of a soak. steps_lost: taken, and not in a whole checkpoint, at each kill."""

    kills: int = 0
    runs: int = 0
    fell: Counter[str] = field(default_factory=Counter)
    steps_lost: list[int] = field(default_factory=list)
    resume_seconds: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def figures(self) -> dict[str, object]:
        """As it is printed."""
        values = asdict(self) | {"fell": dict(self.fell.most_common())}
        lost, seconds = values.pop("steps_lost"), values.pop("resume_seconds")
        return values | {
            "save_every": SAVE_EVERY,
            "steps_lost_max": max(lost, default=0),
            "steps_lost_mean": round(statistics.mean(lost), 2) if lost else 0,
            "resume_seconds_median": round(statistics.median(seconds), 2) if seconds else None,
            "resume_seconds_max": round(max(seconds), 2) if seconds else None,
        }


@dataclass(frozen=True)
class Life:
    """One run folder, with a cache of its own."""

    folder: Path

    @property
    def run(self) -> Path:
        """The run folder."""
        return self.folder / "runs" / "soak"

    @property
    def output(self) -> Path:
        """What the processes said."""
        return self.folder / "output.txt"

    def environment(self) -> dict[str, str]:
        """Caches inside the folder, so that each life prepares its rows and scores its reference itself."""
        return {"XDG_CACHE_HOME": str(self.folder / "cache"), "OMP_NUM_THREADS": "1"}

    def start(self) -> int:
        """`tunesmith run` in a process of its own; its id."""
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            os.setsid()
            os.environ.update(self.environment())
            handle = os.open(self.output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            sys.stdout = os.fdopen(1, "w", buffering=1)
            sys.stderr = os.fdopen(2, "w", buffering=1)
            tunesmith_main(["run", str(self.folder.parent / "recipe.yaml"), f"runs_folder={self.folder / 'runs'}"])
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 0
        finally:
            os._exit(code)

    def said(self, since: int) -> str:
        """The output from a byte on."""
        return self.output.read_bytes()[since:].decode("utf-8", "replace") if self.output.exists() else ""

    def said_bytes(self) -> int:
        """Bytes of the output so far."""
        return self.output.stat().st_size if self.output.exists() else 0


def write_inputs(folder: Path) -> None:
    """A recipe, and rows of the quickstart."""
    source = Path(tunesmith.__file__).parent / "embedded" / "quickstart"
    for name, number in (("sft", 40), ("eval", 6), ("preferences", 32), ("heldout_preferences", 6)):
        with gzip.open(source / f"{name}.jsonl.gz", "rt", encoding="utf-8") as rows:
            (folder / f"{name}.jsonl").write_text("".join(line for line, _ in zip(rows, range(number), strict=False)))
    common = {"max_length": 128, "batch_size": 4, "save_every": SAVE_EVERY, "learning_rate": 1e-3}
    lora = {"kind": "lora", "r": 4, "dropout": 0.1}
    sft = {"name": "sft", "method": "sft", "max_steps": 8, "eval_every": 4, "tuning": lora} | common
    dpo = {"name": "dpo", "method": "dpo", "max_steps": 8, "eval_every": 4, "tuning": lora} | common
    sft |= {"train": [{"path": str(folder / "sft.jsonl")}], "heldout": [{"path": str(folder / "eval.jsonl")}]}
    dpo |= {"train": [{"path": str(folder / "preferences.jsonl")}]}
    dpo |= {"heldout": [{"path": str(folder / "heldout_preferences.jsonl")}]}
    model = {"path": "embedded:quickstart/model", "dtype": "float32"}
    recipe = {"name": "soak", "threads": 1, "model": model, "stages": [sft, dpo]}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML


def run_unbroken(folder: Path) -> Life:
    """The same command, in a process that nobody disturbs."""
    life = Life(folder / "whole")
    life.folder.mkdir()
    command = [sys.executable, "-m", "tunesmith", "run", str(folder / "recipe.yaml")]
    command.append(f"runs_folder={life.folder / 'runs'}")
    environment = os.environ | life.environment()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        raise SystemExit(f"the unbroken run failed:\n{done.stdout}\n{done.stderr}")
    return life


def newest_whole(life: Life, stage: str) -> int:
    """Step of the newest whole checkpoint of a stage; 0 where there is none."""
    folder = life.run / "stages" / stage / "checkpoints"
    return max((step for step in list_steps(folder) if not find_problem(path_of(folder, step))), default=0)


def num_steps_taken(life: Life, stage: str) -> int:
    """Steps of which a whole record is there."""
    path = life.run / "stages" / stage / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def is_alive(pid: int) -> bool:
    """Whether the process runs on; one that ended stays to be waited for."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def wait_for(life: Life, pid: int, since: int, target: str, draw: random.Random) -> float:
    """Until the instant of a kill that is aimed at `target`, or the process ended by itself; seconds to the target."""
    begin = time.monotonic()
    end = begin + LONGEST_SECONDS
    while is_alive(pid) and time.monotonic() < end and not _is_at(life, pid, since, target):
        time.sleep(POLL_SECONDS)
    longest = {"save": 0.006, "result": 0.02, "reference": 0.3, "preparation": 0.5, "start": 0.5, "training": 1.0}
    seconds = time.monotonic() - begin
    time.sleep(draw.uniform(0.0, longest[target]))
    return seconds


def _is_at(life: Life, pid: int, since: int, target: str) -> bool:
    stages = life.run / "stages"
    if target == "preparation":
        return True
    if target == "save":
        return any(stages.glob(f"*/checkpoints/.tmp-*-{pid}"))  # of this process, not of a dead one
    if target == "result":
        return any(stages.glob(f"*/.tmp-adapter-{pid}"))
    said = life.said(since)
    if target == "reference":
        return "stage dpo: dpo" in said and "packing:" in said.partition("stage dpo: dpo")[2]
    return ("] step" if target == "training" else "stage ") in said


def where_it_fell(life: Life, pid: int, since: int) -> str:
    """What the process was doing when it died, from what it left."""
    stages = life.run / "stages"
    if any(stages.glob(f"*/checkpoints/.tmp-removed-*-{pid}")):
        return "removal of an older checkpoint"
    if any(stages.glob(f"*/checkpoints/.tmp-*-{pid}")):
        return "save"
    results = [*stages.glob(f"*/.tmp-adapter-{pid}"), *stages.glob(f"*/.tmp-result.json-{pid}")]
    unfinished = [path for path in stages.glob("*/adapter") if not (path.parent / "result.json").exists()]
    if results or unfinished:
        return "result"
    lines = [line for line in life.said(since).splitlines() if line.strip()]
    if not any(line.startswith("stage ") for line in lines):
        return "preparation"
    last = lines[-1]
    if last.startswith("packing:") and any(line.startswith("stage dpo: dpo") for line in lines):
        return "reference"
    return "training" if last.startswith("[") else "start of a stage"


def live(life: Life, num_kills: int, draw: random.Random, report: Report) -> None:
    """Kill one run `num_kills` times, then let it end."""
    life.folder.mkdir()
    best = dict.fromkeys(STAGES, 0)
    for number in range(num_kills + 1):
        since, pid, begin = life.said_bytes(), life.start(), time.monotonic()
        taken = {stage: num_steps_taken(life, stage) for stage in STAGES}
        if number < num_kills:
            target = draw.choices(list(TARGETS), list(TARGETS.values()))[0]
            seconds = wait_for(life, pid, since, target, draw)
            if target == "training" and any(best.values()) and is_alive(pid):
                report.resume_seconds.append(seconds)
            os.kill(pid, signal.SIGKILL)
        elif any(best.values()):
            resume = _seconds_to_a_step(life, pid, since, begin)
            report.resume_seconds += [resume] if resume is not None else []
        _, status = os.waitpid(pid, 0)
        if os.WIFEXITED(status):  # by itself: at its end, or because it failed
            if os.WEXITSTATUS(status):
                report.problems.append(f"{life.folder.name}: exit {os.WEXITSTATUS(status)}: {life.said(since)[-2000:]}")
            return
        report.kills += 1
        report.fell[where_it_fell(life, pid, since)] += 1
        _count_loss(life, best, taken, report)


def _seconds_to_a_step(life: Life, pid: int, since: int, begin: float) -> float | None:
    while is_alive(pid):
        if "] step" in life.said(since):
            return time.monotonic() - begin
        time.sleep(0.01)
    return None


def _count_loss(life: Life, best: dict[str, int], taken: dict[str, int], report: Report) -> None:
    lost = 0
    for stage in STAGES:
        newest = newest_whole(life, stage)
        if newest < best[stage]:
            report.problems.append(f"{life.folder.name}: stage {stage} had step {best[stage]} and has {newest}")
        best[stage] = newest
        lost = max(lost, num_steps_taken(life, stage) - newest)
    report.steps_lost.append(lost)
    if lost > SAVE_EVERY:
        report.problems.append(f"{life.folder.name}: {lost} steps lost; there were records of {taken} before")


def bytes_of(life: Life) -> dict[str, bytes]:
    """Every file of the stages but those with a clock or the machine's memory in them."""
    root = life.run / "stages"
    clocks = {"timings.jsonl", "memory.json", "budget.jsonl"}
    files = [path for path in sorted(root.rglob("*")) if path.is_file() and path.name not in clocks]
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def compare(life: Life, whole: dict[str, bytes], report: Report) -> None:
    """Note every file that is not as in the unbroken run."""
    found = bytes_of(life)
    different = sorted(name for name in found.keys() | whole.keys() if found.get(name) != whole.get(name))
    report.problems += [f"{life.folder.name}: {name} differs" for name in different]
    report.problems += [f"{life.folder.name}: {path} was left" for path in life.run.rglob(".tmp-*")]
    for path in [life.run, *life.run.rglob("*")]:
        mode = path.stat().st_mode & 0o777
        if mode != (0o700 if path.is_dir() else 0o600):
            report.problems.append(f"{life.folder.name}: {path} has mode {mode:o}")


def soak(folder: Path, num_kills: int, seed: int) -> Report:
    """Lives of some kills each, until there were `num_kills`."""
    draw, report = random.Random(seed), Report()
    write_inputs(folder)
    whole = bytes_of(run_unbroken(folder))
    assert any(name.startswith("dpo/adapter/") for name in whole)
    while report.kills < num_kills and not report.problems:
        life = Life(folder / f"life-{report.runs}")
        live(life, min(KILLS_A_LIFE, num_kills - report.kills), draw, report)
        report.runs += 1
        compare(life, whole, report)
        if not report.problems:
            shutil.rmtree(life.folder)
    return report


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "folder", type=Path, nargs="?", default=None, help="where to work; the temporary folder if none"
    )
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(1)
    os.umask(0)  # what a run makes is private all the same
    place = given.folder or Path(tempfile.mkdtemp(prefix="tunesmith-soak-"))
    place.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    outcome = soak(place.resolve(), given.kills, given.seed)
    print(json.dumps(outcome.figures() | {"seconds": round(time.monotonic() - started, 1)}))
    sys.exit(1 if outcome.problems else 0)
