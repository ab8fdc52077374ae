"""Measure Tunesmith and TRL in turn, on the same model and rows, case by case, and write the table.

In: cases, sizes, rounds, the Python with TRL. Out: `results/latest.json` and the table in `docs/benchmarks.md`, or for
trial sizes `work/latest.json`. Must not know: how either side works; it starts processes and reads their JSON.

A round measures every side of a case once, every other round backwards. A ratio is taken within a round, between
neighbours in time, so that a slow spell of the machine falls on both of its sides. What is done is saved after every
measurement (`work/partial.json`) and, as figures, after every round.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import report, search, table
from benchmarks.cases import CASES, LONG, SHORT, Case, Setting, sides
from benchmarks.processes import HERE, ROOT, WORK, Failed, measure, measure_gemm, run
from benchmarks.workload import Shape, Workload, make_pairs, make_rows

FULL = {"steps": 1, "pairs_per_step": 16, "rounds": 3}
"""Least sizes that are written to `results/` and into the page."""
TOY = Shape(hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=96, vocab_size=4096)
TOY_SCALE = 0.1


def write_workloads(folder: Path, args: argparse.Namespace) -> Workload:
    """The rows of every side: the main ones, those of the search, and those of case e."""
    shape = TOY if args.toy else Shape()
    scale = TOY_SCALE if args.toy else 1.0
    pairs = make_pairs(args.steps * args.pairs_per_step, seed=args.seed, vocab_size=shape.vocab_size, scale=scale)
    fixed = {"num_threads": args.threads, "seed": args.seed, "shape": shape}
    workload = Workload(pairs=pairs, pairs_per_step=args.pairs_per_step, **fixed)
    workload.save(folder / "workload.json")
    few = pairs[: search.NUM_ROWS]
    Workload(pairs=few, pairs_per_step=len(few), **fixed).save(folder / "search.json")
    for length in (SHORT, LONG):
        tokens = round(length * scale)
        rows = make_rows(LONG // length, tokens, seed=args.seed, vocab_size=shape.vocab_size)
        Workload(pairs=rows, pairs_per_step=len(rows), **fixed).save(folder / f"rows_{length}.json")
    return workload


def prepare(folder: Path, args: argparse.Namespace, cases: list[Case]) -> None:
    """Weights and adapter; for case f also rows, and a run that fills the caches."""
    command = [sys.executable, "-m", "benchmarks.prepare", str(folder)]
    run(command, folder=folder, threads=args.threads, log="prepare")
    if any(case.key == "f" for case in cases):
        print("filling the caches for case f", flush=True)
        command = [sys.executable, "-m", "benchmarks.startup", str(folder), "--warm-up"]
        run([*command, "--scale", str(args.startup_scale)], folder=folder, threads=args.threads, log="warm-up")


def choose_best(case: Case, folder: Path, args: argparse.Namespace) -> tuple[Setting | None, list[search.Trial]]:
    """TRL's best settings for a case: given, or searched."""
    if not case.peer:
        return None, []
    if args.best:
        return args.best, []
    return search.find_best(
        case,
        folder=folder,
        threads=args.threads,
        peer_python=args.peer_python,
        num_rows=min(search.NUM_ROWS, args.steps * args.pairs_per_step),
        one_step=args.steps == 1,
    )


def measure_case(case: Case, folder: Path, args: argparse.Namespace, save: Callable[[dict[str, Any]], None]) -> None:
    """All rounds of a case; `save` is called after each with what is there."""
    best, trials = choose_best(case, folder, args)
    order = sides(case, rows_per_step=args.pairs_per_step, best=best)
    measurements: list[dict[str, Any]] = []
    gemm: list[dict[str, float]] = []
    done = {
        "names": {side.key: side.name for side in order},
        "search": [asdict(trial) | {"text": search.described(trial)} for trial in trials],
        "measurements": measurements,
        "gemm": gemm,
    }
    for number in range(args.rounds):
        gemm.append(measure_gemm(folder, args.threads))
        print(f"{case.key}, round {number + 1}/{args.rounds}: GEMM {max(gemm[-1].values()):.0f} GFLOP/s", flush=True)
        for side in order if number % 2 == 0 else order[::-1]:
            log = f"{case.key}-{side.key}"
            common = {"folder": folder, "threads": args.threads, "peer_python": args.peer_python, "log": log}
            result = measure(side, case.task, **common)
            measurements.append({"round": number, **result})
            print(f"  {side.name}: {shown(measurements[-1])}", flush=True)
            (WORK / "partial.json").write_text(json.dumps({"case": case.key, **done}))
        save(done)


def shown(row: dict[str, Any]) -> str:
    """A measurement in a line."""
    if "losses" not in row:
        return f"{row['seconds']:.1f} s to the end of the first step, {row['seconds_to_step']:.1f} s to its begin"
    return f"{row['seconds']:.1f} s, peak {row['peak_rss_gib']:.2f} GiB, first loss {row['losses'][0]:.5f}"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    listed = "; ".join(f"{case.key}: {case.title}" for case in CASES.values())
    parser.add_argument("--cases", default=",".join(CASES), help=f"which, and in which order. {listed}")
    parser.add_argument("--rounds", type=int, default=FULL["rounds"])
    parser.add_argument("--steps", type=int, default=FULL["steps"], help="optimizer steps of a measurement")
    parser.add_argument("--pairs-per-step", type=int, default=FULL["pairs_per_step"])
    parser.add_argument("--best", type=Setting.parse, help="TRL's best, not searched: batch=1,checkpointing=off")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of pairs and weights")
    parser.add_argument(
        "--startup-scale", type=float, default=0.1, help="lengths of case f's rows, as a share of the other cases'"
    )
    parser.add_argument("--peer-python", default=str(HERE / ".venv-bench" / "bin" / "python"), help="Python with TRL")
    parser.add_argument("--toy", action="store_true", help=argparse.SUPPRESS)  # a tiny model, to see that all runs
    args = parser.parse_args()
    unknown = set(args.cases.split(",")) - set(CASES)
    if unknown:
        parser.error(f"no such case: {', '.join(sorted(unknown))}")
    if args.pairs_per_step % min(4, args.pairs_per_step):
        parser.error("--pairs-per-step must be a multiple of 4, TRL's batch")
    if args.best and args.pairs_per_step % args.best.batch:
        parser.error("--pairs-per-step must be a multiple of the batch of --best")
    return args


def merge(path: Path, case: dict[str, Any]) -> dict[str, Any]:
    """Put a case's figures in the place of its earlier ones; what other calls measured stays."""
    before = json.loads(path.read_text()) if path.is_file() else {}
    cases = before["cases"] if before.get("schema") == report.SCHEMA else {}
    cases[case["key"]] = case
    result = {"schema": report.SCHEMA, "cases": {key: cases[key] for key in CASES if key in cases}}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    return result


def main() -> None:
    args = parse_args()
    WORK.mkdir(exist_ok=True)
    full = not args.toy and all(vars(args)[key] >= least for key, least in FULL.items())
    trial, kept = WORK / "latest.json", HERE / "results" / "latest.json"
    trial.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="tunesmith-bench-") as name:
        folder = Path(name)
        workload = write_workloads(folder, args)
        cases = [CASES[key] for key in args.cases.split(",")]
        prepare(folder, args, cases)
        for case in cases:
            begin = time.time()

            def save(done: dict[str, Any], case: Case = case, begin: float = begin) -> None:
                found = report.summarize(
                    case, done, folder=folder, workload=workload, minutes=(time.time() - begin) / 60
                )
                merge(trial, found)
                if full and len(done["gemm"]) == args.rounds:
                    report.put_table(ROOT / "docs" / "benchmarks.md", table.table(merge(kept, found)))

            try:
                measure_case(case, folder, args, save)
            except Failed as problem:
                raise SystemExit(str(problem)) from problem
    print(f"\n{table.table(json.loads(trial.read_text()))}\nWritten to {(kept if full else trial).relative_to(ROOT)}.")


if __name__ == "__main__":
    main()
