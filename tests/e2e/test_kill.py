"""R2: kill -9 at any instant loses at most `save_every` steps and needs no repair (F1 to F3, F24, trap 64)."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from tests.support.faults import Faults, installed
from tests.support.little_stage import content, newest_whole, run
from tests.support.training import Trial, sft_stage
from tunesmith.recipe.models import Lora
from tunesmith.train.checkpoint import OPTIMIZER, STATE, WEIGHTS

NUM_KILLS = 10


def test_killed_ten_times_equals_never_killed(tmp_path: Path, project: Path) -> None:
    """Real runs, two stages; what the harness compares and counts is in its report."""
    command = [sys.executable, "-m", "tests.support.kill_soak", str(tmp_path), "--kills", str(NUM_KILLS), "--seed", "5"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=project, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.stdout, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["problems"] == []
    assert done.returncode == 0
    assert found["kills"] == NUM_KILLS
    assert found["steps_lost_max"] <= found["save_every"]
    assert found["fell"].get("save", 0) + found["fell"].get("removal of an older checkpoint", 0) >= 1


def kill_at(path: Path, number: int, *, last: int) -> bool:
    """Run the little stage in a process that is killed before its operation `number`; whether it lived so long."""
    pid = os.fork()
    if not pid:
        try:
            with installed(Faults(path, number, "kill")):
                run(path, last=last, keep=1)
        finally:
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def test_sigkill_before_every_operation_of_a_save(tmp_path: Path) -> None:
    start, whole, path = tmp_path / "start", tmp_path / "whole", tmp_path / "stage"
    run(start, last=9, keep=1)
    shutil.copytree(start, whole)
    run(whole, last=10, keep=1)
    shutil.copytree(start, path)
    number = 0
    while kill_at(path, number, last=10):
        assert newest_whole(path) >= 9, number
        with installed(Faults(path)):
            run(path, last=10, keep=1)
        assert content(path) == content(whole), number
        shutil.rmtree(path)
        shutil.copytree(start, path)
        number += 1
    assert number > 40


def test_sigkill_in_saves_of_the_real_loop(tmp_path: Path) -> None:
    """A model with an adapter and dropout, killed inside saves one after another, is the one that never was."""
    stage = sft_stage(tuning=Lora(r=2, dropout=0.1), max_steps=4, epochs=2, save_every=1, eval_every=2, keep="final")
    whole, killed = Trial(tmp_path / "whole", stage), Trial(tmp_path / "killed", stage)
    whole.run()
    kills = 0
    for number in (12, 31, 50, 55, 9, 28, 47, 61):
        pid = os.fork()
        if not pid:
            try:
                with installed(Faults(killed.folder, number, "kill")):
                    killed.run()
            finally:
                os._exit(0)
        _, status = os.waitpid(pid, 0)
        kills += os.WIFSIGNALED(status)
    assert kills > 4
    killed.run()
    for name in (
        "metrics.jsonl",
        "eval.jsonl",
        *(f"checkpoints/step-4/{each}" for each in (WEIGHTS, OPTIMIZER, STATE)),
    ):
        assert (killed.folder / name).read_bytes() == (whole.folder / name).read_bytes(), name
    assert not list(killed.folder.rglob(".tmp-*"))
