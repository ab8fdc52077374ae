"""Measure Tunesmith and TRL in turn, on the same model and rows, and write the table.

In: sizes, rounds, the Python of each side. Out: `results/latest.json` and the table in `docs/benchmarks.md`.
Must not know: how either side works; it starts processes and reads their JSON.

A round measures every side once, in the order ours, TRL, TRL and, every other round, backwards. A ratio is taken
within a round, between neighbours in time, so that a slow spell of the machine falls on both of its sides.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks import report
from benchmarks.workload import METHODS, Workload, make_pairs

HERE = Path(__file__).parent
ROOT = HERE.parent
WORK = HERE / "work"  # ignored by git: logs, and the results of trial sizes
FULL = {"steps": 4, "pairs_per_step": 16, "rounds": 3}


@dataclass(frozen=True)
class Side:
    """One column of the comparison: who, and with which batch size (rows a forward pass; None: ours decides)."""

    key: str
    name: str
    batch: int | None = None


def sides(pairs_per_step: int) -> list[Side]:
    """Ours, TRL with its usual batch of 4, and TRL with a batch of 1, which pads least."""
    usual = min(4, pairs_per_step)
    return [
        Side("tunesmith", "Tunesmith"),
        Side("trl_default", f"TRL, batch {usual} x {pairs_per_step // usual}", usual),
        Side("trl_batch1", f"TRL, batch 1 x {pairs_per_step}", 1),
    ]


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
    }
    return os.environ | fixed


def run(command: list[str], *, folder: Path, threads: int, log: Path) -> str:
    """Run a worker to its end; its output is returned and kept in `log`."""
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment(folder, threads),
        stdout=subprocess.PIPE,
        stderr=log.with_suffix(".err").open("w"),
        text=True,
    )
    log.write_text(done.stdout)
    if done.returncode:
        tail = log.with_suffix(".err").read_text()[-2000:]
        raise SystemExit(f"{' '.join(command[1:4])} ended with code {done.returncode}:\n{tail}")
    return done.stdout


def measure(side: Side, method: str, *, folder: Path, threads: int, peer_python: str) -> dict[str, object]:
    """One measurement: a fresh process, its JSON, and how busy the machine was before it."""
    out = folder / "measurement.json"
    load = os.getloadavg()[0]
    if side.batch is None:
        command = [sys.executable, "-m", "benchmarks.worker_tunesmith"]
    else:
        command = [peer_python, "-m", "benchmarks.worker_trl", "--batch", str(side.batch)]
    command += [str(folder), "--method", method, "--out", str(out)]
    run(command, folder=folder, threads=threads, log=WORK / f"{side.key}-{method}.log")
    return {"method": method, "side": side.key, "load_before": load, **json.loads(out.read_text())}


def measure_gemm(folder: Path, threads: int) -> dict[str, float]:
    """The machine's matrix-product rates now, GFLOP/s by shape."""
    command = [sys.executable, "-m", "benchmarks.gemm", "--threads", str(threads)]
    rates: dict[str, float] = json.loads(run(command, folder=folder, threads=threads, log=WORK / "gemm.log"))
    return rates


def measure_all(args: argparse.Namespace, folder: Path, done: dict[str, object]) -> None:
    """All rounds; `done` grows, and is saved, with every measurement."""
    order = sides(args.pairs_per_step)
    measurements: list[dict[str, object]] = []
    gemm: list[dict[str, float]] = []
    done.update(measurements=measurements, gemm=gemm)
    for number in range(args.rounds):
        gemm.append(measure_gemm(folder, args.threads))
        print(f"round {number + 1}/{args.rounds}: GEMM {max(gemm[-1].values()):.0f} GFLOP/s", flush=True)
        for method in args.methods:
            for side in order if number % 2 == 0 else order[::-1]:
                result = measure(side, method, folder=folder, threads=args.threads, peer_python=args.peer_python)
                measurements.append({"round": number, **result})
                print(
                    f"  {method} {side.name:24} {result['seconds']:8.1f} s  peak {result['peak_rss_gib']:.2f} GiB"
                    f"  first loss {result['losses'][0]:.5f}",
                    flush=True,
                )
                (WORK / "partial.json").write_text(json.dumps(done))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", default=str(HERE / ".venv-bench" / "bin" / "python"), help="Python with TRL")
    parser.add_argument("--rounds", type=int, default=FULL["rounds"])
    parser.add_argument("--steps", type=int, default=FULL["steps"], help="optimizer steps of a measurement")
    parser.add_argument("--pairs-per-step", type=int, default=FULL["pairs_per_step"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of pairs and weights")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    args = parser.parse_args()
    if args.pairs_per_step % min(4, args.pairs_per_step):
        parser.error("--pairs-per-step must be a multiple of 4, TRL's batch")
    return args


def main() -> None:
    args = parse_args()
    WORK.mkdir(exist_ok=True)
    workload = Workload(
        pairs=make_pairs(args.steps * args.pairs_per_step, seed=args.seed, vocab_size=32_000),
        pairs_per_step=args.pairs_per_step,
        num_threads=args.threads,
        seed=args.seed,
    )
    begin = time.time()
    done: dict[str, object] = {}
    with tempfile.TemporaryDirectory(prefix="tunesmith-bench-") as name:
        folder = Path(name)
        workload.save(folder / "workload.json")
        command = [sys.executable, "-m", "benchmarks.prepare", str(folder)]
        run(command, folder=folder, threads=args.threads, log=WORK / "prepare.log")
        measure_all(args, folder, done)
    names = {side.key: side.name for side in sides(args.pairs_per_step)}
    result = report.summarize(done, workload, names=names, minutes=(time.time() - begin) / 60)
    full = all(vars(args)[key] >= least for key, least in FULL.items()) and set(args.methods) == set(METHODS)
    out = HERE / "results" / "latest.json" if full else WORK / "latest.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    table = report.table(result)
    if full:
        report.put_table(ROOT / "docs" / "benchmarks.md", table)
    print(f"\n{table}\nWritten to {out.relative_to(ROOT)}.")


if __name__ == "__main__":
    main()
