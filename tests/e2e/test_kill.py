"""R2: kill -9 at any instant loses at most `save_every` steps and needs no repair."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tunesmith.runs.atomic import sha256_file
from tunesmith.train.checkpoint import OPTIMIZER, STATE, WEIGHTS

NUM_KILLS = 10


def test_killed_ten_times_equals_never_killed(tmp_path: Path, project: Path) -> None:
    command = [sys.executable, "-m", "tests.support.kill_soak", str(tmp_path), str(NUM_KILLS), "5"]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["exit"] == 0, done.stderr
    assert found["lost"] == 0
    assert found["kills"] >= 3, "the machine is too fast for the kills to land"
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for name in ("metrics.jsonl", "eval.jsonl"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    for name in (WEIGHTS, OPTIMIZER, STATE):
        last = f"checkpoints/step-36/{name}"
        assert sha256_file(killed / last) == sha256_file(whole / last)
    assert not list(killed.rglob(".tmp-*"))
