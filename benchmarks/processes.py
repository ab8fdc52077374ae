"""Processes of the benchmark: one a measurement, all in the same environment, under a limit of memory.

In: commands. Out: what they wrote. Must not know: what is measured.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.cases import Side
from benchmarks.workload import Task

HERE = Path(__file__).parent
ROOT = HERE.parent
WORK = HERE / "work"  # ignored by git: logs, and the results of trial sizes
MEMORY_SHARE = 0.85
"""Of the machine's memory: a setting that needs more fails by itself, before the system ends some other process."""


class Failed(Exception):
    """A worker that ended with an error; the text is the tail of what it said."""


class TooSlow(Exception):
    """A worker that was ended because it took longer than it was given."""


def environment(folder: Path, threads: int) -> dict[str, str]:
    """The same for every process: threads, no network, no caches outside the work folder."""
    fixed = {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONWARNINGS": "ignore",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    return os.environ | fixed


def limit_memory() -> None:
    """Private memory of this process and of what it starts; a larger request fails."""
    wanted = int(MEMORY_SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    resource.setrlimit(resource.RLIMIT_DATA, (wanted, wanted))


def run(command: list[str], *, folder: Path, threads: int, log: str, seconds: float | None = None) -> str:
    """Run a worker to its end; its output is returned and kept in the work folder. Raises Failed and TooSlow."""
    path, errors = WORK / f"{log}.log", WORK / f"{log}.err"
    with errors.open("w") as stderr:
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env=environment(folder, threads),
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                timeout=seconds,
                preexec_fn=limit_memory,
            )
        except subprocess.TimeoutExpired as problem:  # the process was killed and is gone
            raise TooSlow(f"over {seconds:.0f} s") from problem
    path.write_text(done.stdout)
    if done.returncode:
        raise Failed(f"{' '.join(command[1:4])} ended with code {done.returncode}:\n{errors.read_text()[-2000:]}")
    return done.stdout


def measure(
    side: Side, task: Task, *, folder: Path, threads: int, peer_python: str, log: str, seconds: float | None = None
) -> dict[str, Any]:
    """One measurement: a fresh process, its JSON, and how busy the machine was before it."""
    out = folder / "measurement.json"
    out.unlink(missing_ok=True)
    load = os.getloadavg()[0]
    if side.who == "startup":
        command = [sys.executable, "-m", "benchmarks.startup", str(folder)]
    else:
        python = sys.executable if side.who == "tunesmith" else peer_python
        command = [python, "-m", f"benchmarks.worker_{side.who}", str(folder), "--rows", side.rows]
        command += ["--method", task.method, "--tuning", task.tuning, "--reference", task.reference]
    if side.setting is not None:
        command += ["--setting", side.setting.text()]
    run([*command, "--out", str(out)], folder=folder, threads=threads, log=log, seconds=seconds)
    result: dict[str, Any] = json.loads(out.read_text())
    return {"side": side.key, "load_before": load, **result}


def measure_gemm(folder: Path, threads: int) -> dict[str, float]:
    """The machine's matrix-product rates now, GFLOP/s by shape."""
    command = [sys.executable, "-m", "benchmarks.gemm", "--threads", str(threads)]
    rates: dict[str, float] = json.loads(run(command, folder=folder, threads=threads, log="gemm"))
    return rates
