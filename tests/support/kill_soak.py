"""Kills a stage again and again, at instants drawn over its life, and lets it go on: R2, F1, F2, F3.

    python -m tests.support.kill_soak FOLDER KILLS SEED

Every run is a process of its own (a fork of this one, which has imported everything and done nothing with it).
Prints one JSON object; the test compares the folders.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from tests.support.training import Trial, sft_stage
from tunesmith.recipe.models import Lora
from tunesmith.train.checkpoint import find_problem, list_steps

WAIT_SECONDS = 5.0
DONE = 0


def trial(folder: Path) -> Trial:
    """36 short steps, a save after every second one: about half of the time is spent in saves."""
    stage = sft_stage(tuning=Lora(r=4, dropout=0.1), epochs=12, eval_every=6, save_every=2, keep_checkpoints=2)
    return Trial(folder, stage)


def start(folder: Path) -> int:
    """The stage in a process of its own; its id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        trial(folder).run()
        os._exit(DONE)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)


def wait_for(folder: Path, pid: int, draw: random.Random, longest_seconds: float) -> None:
    """Until the instant of the kill: in half of the cases while a save is under way."""
    time.sleep(draw.uniform(0.0, longest_seconds))
    if draw.random() < 0.5:
        end = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < end and not in_save(folder, pid):
            time.sleep(0.0002)
        time.sleep(draw.uniform(0.0, 0.01))


def in_save(folder: Path, pid: int) -> bool:
    """Whether the process is, or died, in the middle of a save or of a removal."""
    return any(folder.glob(f"checkpoints/.tmp-*-{pid}"))


def soak(folder: Path, num_kills: int, seed: int, whole_seconds: float) -> dict[str, object]:
    """Kill `num_kills` times, each within a quarter of a whole run's time, then let it end.

    `lost`: times at which a checkpoint had been and none was whole.
    """
    draw = random.Random(seed)
    kills, lost, in_saves, largest_step = 0, 0, 0, 0
    while kills < num_kills:
        pid = start(folder)
        wait_for(folder, pid, draw, min(1.0, whole_seconds / 4))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if os.WIFEXITED(status):
            if os.WEXITSTATUS(status) != DONE:
                return {"error": "a run failed by itself"}
            break  # it ended before the kill
        kills += 1
        in_saves += in_save(folder, pid)
        whole = [
            step for step in list_steps(folder / "checkpoints") if not find_problem(folder / f"checkpoints/step-{step}")
        ]
        lost += max(whole, default=0) < largest_step
        largest_step = max(whole, default=0)
    _, status = os.waitpid(start(folder), 0)
    return {"kills": kills, "in_save": in_saves, "lost": lost, "exit": os.waitstatus_to_exitcode(status)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    begin = time.monotonic()
    _, code = os.waitpid(start(root / "whole"), 0)
    seconds = time.monotonic() - begin
    kills, seed = int(sys.argv[2]), int(sys.argv[3])
    found = soak(root / "killed", kills, seed, seconds) if code == 0 else {"error": "no whole run"}
    print(json.dumps(found))
