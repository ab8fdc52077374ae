"""How long `tunesmith run` takes to its first step on 1,000 pairs whose data and reference are cached.

In: the work folder with the benchmark's model. Out: seconds, beyond what importing torch, transformers and peft takes.
Must not know: what a run does in that time; it starts the command and watches the run folder.

`warm_up` runs once and fills both caches. `measure` then starts a run of another name, which has no folder yet, and
waits for the first step's record. The run's process imports the three libraries first and says when it has them, on
the monotonic clock, which all processes of a machine share.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.workload import Workload, load_workload
from tunesmith.recipe.resources import embedded

NUM_PAIRS, BATCH_SIZE = 1_000, 16
POLL_SECONDS = 0.005
LAUNCHER = """
import time, torch, transformers, peft
print("imported", time.monotonic(), flush=True)
from tunesmith.cli.main import main
main(["run", {path!r}])
"""


def make_rows(count: int, *, seed: int, scale: float) -> list[dict[str, str]]:
    """Pairs of random two-letter words, about two tokens each: log-normal lengths as in `workload.make_pairs`."""
    draw = random.Random(seed)

    def words(median_tokens: float) -> str:
        tokens = min(median_tokens * math.exp(0.7 * draw.gauss(0, 1)), 900) * scale
        return " ".join("".join(draw.choices("aeilnorst", k=2)) for _ in range(max(2, round(tokens / 2))))

    return [{"prompt": words(200), "chosen": words(180), "rejected": words(160)} for _ in range(count)]


def recipe(folder: Path, name: str, *, threads: int) -> Path:
    """The recipe of one run, stopped after a step; JSON is YAML."""
    stage = {
        "name": "dpo",
        "method": "dpo",
        "train": [{"path": str(folder / "pairs.jsonl"), "format": "preference"}],
        "max_length": 4096,
        "batch_size": BATCH_SIZE,
        "max_steps": 1,
    }
    content = {
        "name": name,
        "runs_folder": str(folder / "runs" / name),
        "model": {"path": str(folder / "model")},
        "threads": threads,
        "stages": [stage],
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(content, indent=1))
    return path


def start_run(path: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
    """`tunesmith run`, on its way, with the three imports in front."""
    command = [sys.executable, "-c", LAUNCHER.format(path=str(path))]
    with path.with_suffix(".out").open("w") as out:
        return subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str], path: Path) -> None:
    """Wait for the run's end; SystemExit where it failed."""
    if process.wait():
        raise SystemExit(f"tunesmith run ended with code {process.returncode}:\n{path.with_suffix('.out').read_text()}")


def own_environment(folder: Path) -> dict[str, str]:
    """As given, with the caches inside the work folder: warm ones are ours, and nothing is left in a home folder."""
    return os.environ | {"XDG_CACHE_HOME": str(folder / "cache")}


def warm_up(folder: Path, workload: Workload, *, scale: float) -> None:
    """Write rows and tokenizer, and run once."""
    tokenizer = embedded("embedded:quickstart/model")
    assert tokenizer is not None
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tokenizer / name, folder / "model" / name)
    rows = make_rows(NUM_PAIRS, seed=workload.seed, scale=scale)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = recipe(folder, "warm", threads=workload.num_threads)
    finish(start_run(path, own_environment(folder)), path)


def measure(folder: Path, workload: Workload) -> dict[str, object]:
    """Time a run up to its first step."""
    name = f"run-{time.time_ns()}"
    path = recipe(folder, name, threads=workload.num_threads)
    record = folder / "runs" / name / name / "stages" / "dpo" / "timings.jsonl"
    begin = time.monotonic()
    process = start_run(path, own_environment(folder))
    while not (record.is_file() and record.stat().st_size) and process.poll() is None:
        time.sleep(POLL_SECONDS)
    end = time.monotonic()
    finish(process, path)
    output = path.with_suffix(".out").read_text()
    if "from the cache" not in output:
        raise SystemExit(f"the reference was not taken from the cache, so this is no warm start:\n{output}")
    imported = next(float(line.split()[1]) for line in output.splitlines() if line.startswith("imported "))
    step_seconds = json.loads(record.read_text().splitlines()[0])["seconds"]
    return {
        "seconds": end - imported,
        "import_seconds": imported - begin,
        "step_seconds": step_seconds,
        "seconds_to_step": end - imported - step_seconds,
        "output": output,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="holds workload.json and model/")
    parser.add_argument("--warm-up", action="store_true")
    parser.add_argument("--scale", type=float, default=1.0, help="of the rows' lengths, for --warm-up")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    workload = load_workload(args.folder / "workload.json")
    if args.warm_up:
        warm_up(args.folder, workload, scale=args.scale)
    else:
        args.out.write_text(json.dumps(measure(args.folder, workload)))


if __name__ == "__main__":
    main()
