"""Measure on the GPU of this machine, the most important first, within a budget of minutes; go on where it stopped.

In: `--state`, a JSON that is carried from call to call. Out: the same JSON, written after every measurement, and a
table on the terminal. `python -m benchmarks.gpu --minutes 9`, or `--toy` for a minute on any CPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import time
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.gpu import table
from benchmarks.gpu.cases import CHECKPOINTED, JOBS, Case, Job, Side, as_json
from benchmarks.gpu.drive import Worker, result_of, run_alone, run_together, start
from benchmarks.gpu.shapes import SHAPES

HERE = Path(__file__).parent
WORK = HERE.parent / "work"  # ignored by git; the state in it is carried
MODULES = {"ours": "benchmarks.gpu.worker_tunesmith", "trl": "benchmarks.gpu.worker_trl"}
ROOM_GIB = 62.0
"""Room for one side's activations beside the weights of all: with less, the sides run one after another."""


class Run:
    """One call: its budget, its state on disk, and the card."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.deadline = time.monotonic() + 60 * args.minutes
        self.state_path: Path = args.state
        self.state: dict[str, Any] = {"calls": [], "jobs": {}}
        if self.state_path.is_file():
            self.state = json.loads(self.state_path.read_text())
        self.logs: Path = args.logs or args.out / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        args.out.mkdir(parents=True, exist_ok=True)
        self.call: dict[str, Any] = {}

    @property
    def minutes_left(self) -> float:
        return (self.deadline - time.monotonic()) / 60

    def save(self) -> None:
        """After every measurement: in one rename, and a copy where results are fetched from."""
        self.state_path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.state_path.with_suffix(".new")
        fresh.write_text(json.dumps(self.state, indent=1) + "\n")
        fresh.replace(self.state_path)
        copy = self.args.out / "gpu.json"
        if copy.resolve() != self.state_path.resolve():
            shutil.copyfile(self.state_path, copy)

    def measure_card(self) -> None:
        """The rate that this call's utilization is a share of."""
        found = run_alone("gemm", "benchmarks.gpu.gemm", [], logs=self.logs, seconds=120, toy=self.args.toy)
        if "tflops" not in found:
            raise SystemExit(f"the card's rate could not be measured: {found.get('error')}")
        self.call = {"date": datetime.datetime.now(datetime.UTC).date().isoformat(), **found, "toy": self.args.toy}
        self.state["calls"].append(self.call)
        self.save()
        print(f"{found['device']}: GEMM up to {max(found['tflops'].values()):.3g} TFLOP/s", flush=True)


def _start(run: Run, case: Case, side: Side) -> Worker:
    command = ["-m", MODULES[side.kind], "--job", json.dumps(as_json(case, side))]
    return start(f"{case.key}-{side.key}", command, logs=run.logs, toy=run.args.toy)


def _measure(run: Run, case: Case, sides: list[Side], *, num_rounds: int, together: bool) -> dict[str, dict[str, Any]]:
    """Every side's result over `num_rounds` rounds."""
    case = replace(case, rounds=num_rounds)
    results: dict[str, dict[str, Any]] = {}
    for group in [sides] if together else [[side] for side in sides]:
        workers = [_start(run, case, side) for side in group]
        try:
            run_together(workers, num_rounds=num_rounds, deadline=run.deadline)
        finally:
            for worker in workers:
                if worker.process.poll() is None:
                    worker.end("the driver ended")
        for side, worker in zip(group, workers, strict=True):
            result = result_of(worker)
            results[side.key] = {"name": side.name, "call": len(run.state["calls"]) - 1, **result}
            seconds = f"{median(result['seconds']):.2f} s" if result["seconds"] else result["error"]
            peak = f"{result['peak_gib']:.2f} GiB" if result["peak_gib"] else ""
            print(f"  {case.key} {side.name}: {seconds} {peak}", flush=True)
    return results


def _trials(run: Run, job: Job, found: dict[str, Any]) -> list[Side]:
    """Try every side for one round, and return those worth measuring: ours, TRL's default, and TRL's fastest."""
    case = job.case
    assert case is not None
    for side in case.sides:
        if side.key in found["trials"] or run.minutes_left < 0.5:
            continue
        if side.kind == "ours":  # nothing to choose
            continue
        found["trials"] |= _measure(run, case, [side], num_rounds=1, together=False)
        run.save()
    measured = {key: result for key, result in found["trials"].items() if result["seconds"]}
    # Where the default does not fit, the same with checkpointing stands for it.
    standard = "trl_default" if "trl_default" in measured else CHECKPOINTED.key
    rivals = [side for side in case.sides if side.key in measured and side.key != standard]

    def seconds_with_reference(side: Side) -> float:
        result = measured[side.key]
        pairs = case.pairs_per_step * result["steps"]
        share = result["reference_seconds"] / result["reference_pairs"] * pairs if result["reference_pairs"] else 0.0
        return float(result["seconds"][0]) + share

    default = [side for side in case.sides if side.key == standard and side.key in measured]
    best = [min(rivals, key=seconds_with_reference)] if rivals else []
    return [*(side for side in case.sides if side.kind == "ours"), *default, *best]


def compare(run: Run, job: Job) -> None:
    """Trials, then measured rounds of the chosen sides, interleaved where the card holds all of them."""
    case = job.case
    assert case is not None
    found = run.state["jobs"].setdefault(job.key, {"kind": job.kind, "trials": {}, "sides": {}, "finished": False})
    chosen = _trials(run, job, found)
    shape = SHAPES[case.model].toy() if run.args.toy else SHAPES[case.model]
    need = len(chosen) * shape.weight_gib(case.quantization) + ROOM_GIB
    together = run.args.toy or need <= run.call["memory_gib"]
    if run.minutes_left < (0.1 if run.args.toy else 1.5):
        return
    found["sides"] = _measure(run, case, chosen, num_rounds=run.args.rounds or case.rounds, together=together)
    found["interleaved"] = together
    found["finished"] = any(side["seconds"] for side in found["sides"].values())
    run.save()


def in_turn(run: Run, job: Job) -> None:
    """Every side alone, one after another; each is saved when it is done."""
    case = job.case
    assert case is not None
    found = run.state["jobs"].setdefault(job.key, {"kind": job.kind, "sides": {}, "finished": False})
    for side in case.sides:
        if side.key in found["sides"] or run.minutes_left < (0.1 if run.args.toy else 0.5):
            continue
        found["sides"] |= _measure(run, case, [side], num_rounds=case.rounds, together=False)
        run.save()
    found["finished"] = all(side.key in found["sides"] for side in case.sides)
    run.save()


def alone(run: Run, job: Job) -> None:
    """A program of its own: the emulated older card, or the alternatives for the log-probs."""
    if job.kind == "head":
        module, arguments = "benchmarks.gpu.head", ["--minutes", f"{min(job.minutes, run.minutes_left - 0.2):.2f}"]
    else:
        assert job.case is not None
        told = json.dumps(as_json(job.case, job.case.sides[0]))
        module, arguments = "benchmarks.gpu.old_card", ["--job", told]
    found = run_alone(
        job.key, module, arguments, logs=run.logs, seconds=60 * max(0.1, run.minutes_left), toy=run.args.toy
    )
    finished = bool(found) and found.get("error") != "ran out of time"
    call = len(run.state["calls"]) - 1
    run.state["jobs"][job.key] = {"kind": job.kind, "finished": finished, "call": call, **found}
    run.save()
    print(f"  {job.key}: {found.get('summary') or found.get('error')}", flush=True)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="of this call, all of it")
    parser.add_argument("--state", type=Path, default=WORK / "gpu.json", help="the JSON that goes from call to call")
    parser.add_argument("--out", type=Path, default=WORK / "gpu", help="where logs and a copy of the state go")
    parser.add_argument("--logs", type=Path, help="where the workers' output goes; default: in --out")
    parser.add_argument("--only", nargs="+", help="keys of jobs, or patterns of them")
    parser.add_argument("--rounds", type=int, default=0, help="of a comparison; 0: the case's")
    parser.add_argument("--again", action="store_true", help="measure finished jobs again")
    parser.add_argument("--toy", action="store_true", help="tiny shapes, on any machine")
    parser.add_argument("--list", action="store_true", help="print the jobs and stop")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    jobs = [job for job in JOBS if not args.only or any(fnmatch(job.key, key) for key in args.only)]
    if args.list:
        print("\n".join(f"{job.key:32} {job.kind:8} about {job.minutes:.1f} minutes" for job in jobs))
        return
    run = Run(args)
    run.measure_card()
    for job in jobs:
        done = run.state["jobs"].get(job.key, {})
        if done.get("finished") and not args.again:
            continue
        if args.again:
            run.state["jobs"].pop(job.key, None)
        # A comparison that was begun needs less than a whole one; what does not fit leaves its place to what does.
        needed = 0.0 if args.toy else job.minutes * (0.5 if done else 0.8)
        if run.minutes_left < needed:
            print(f"{job.key}: needs about {job.minutes:.1f} minutes, {run.minutes_left:.1f} are left", flush=True)
            continue
        print(f"{job.key} ({run.minutes_left:.1f} minutes left)", flush=True)
        {"compare": compare, "memory": in_turn, "emulate": alone, "head": alone}[job.kind](run, job)
    print(table.table(run.state))


if __name__ == "__main__":
    main()
