"""From raw measurements to figures and verdicts, and the page that shows them.

In: a case's measurements and GEMM rates, the workloads. Out: the content of `latest.json`.
Must not know: how anything was measured, or how it is laid out.
"""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.cases import BARS, LONG, SHORT, Bar, Case
from benchmarks.workload import Task, Workload, load_workload, padded_tokens, useful_flops, useful_tokens

Figure = dict[str, float]
Rows = Mapping[str, Sequence[Mapping[str, Any]]]
"""Measurements by side."""
SCHEMA = 2
LOSS_TOLERANCE = 1e-4
NORM_TOLERANCE = 1e-3
"""Relative. The first loss of DPO is ln 2 whatever the rows are; the gradient's norm depends on every token."""


def figure(values: Sequence[float]) -> Figure:
    """Minimum, median and maximum."""
    return {"min": min(values), "median": median(values), "max": max(values)}


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def machine(threads: int) -> dict[str, Any]:
    """What the measurements ran on, without names of hosts or paths."""
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        "memory_gib": round(memory_gib, 1),
        "system": platform.system(),
        "python": platform.python_version(),
    }


def side_figures(
    rows: Sequence[Mapping[str, Any]], gemm: Sequence[float], *, task: Task, workload: Workload
) -> dict[str, Any]:
    """Figures of one side; `gemm` is the machine's rate in each round, GFLOP/s."""
    tokens, flops = useful_tokens(workload.pairs, task.method), useful_flops(workload.pairs, task, workload.shape)
    seconds = [row["seconds"] for row in rows]
    return {
        "seconds": figure(seconds),
        "cpu_seconds": figure([row["cpu_seconds"] for row in rows]),
        "rows_per_second": figure([len(workload.pairs) / value for value in seconds]),
        "tokens_per_second": figure([tokens / value for value in seconds]),
        "peak_rss_gib": figure([row["peak_rss_gib"] for row in rows]),
        "loaded_rss_gib": figure([row["loaded_rss_gib"] for row in rows]),
        "gemm_share": figure([flops / row["seconds"] / 1e9 / gemm[row["round"]] for row in rows]),
        "useful_tokens": tokens,
        "useful_gflop": flops / 1e9,
    }


def equality(rows: Rows) -> dict[str, Any]:
    """How far the sides' losses and gradient norms lie apart: in the first step, and in all, where updates enter."""
    ours = rows["tunesmith"][0]
    others = [row for side, measured in rows.items() if side != "tunesmith" for row in measured]
    gaps = [[abs(a - b) for a, b in zip(ours["losses"], row["losses"], strict=True)] for row in others]
    norms = [
        [abs(a - b) / a for a, b in zip(ours["gradient_norms"], row["gradient_norms"], strict=True)] for row in others
    ]
    first, norm = max(gap[0] for gap in gaps), max(gap[0] for gap in norms)
    return {
        "losses": {side: measured[0]["losses"] for side, measured in rows.items()},
        "gradient_norms": {side: measured[0]["gradient_norms"] for side, measured in rows.items()},
        "first_step_difference": first,
        "largest_difference": max(map(max, gaps)),
        "first_norm_difference": norm,
        "largest_norm_difference": max(map(max, norms)),
        "equal": first <= LOSS_TOLERANCE and norm <= NORM_TOLERANCE,
    }


def compare(rows: Rows) -> dict[str, Any]:
    """Ours against each other side, round by round: how many times as fast, and the share of memory."""
    ours = {row["round"]: row for row in rows["tunesmith"]}
    return {
        side: {
            "speed": figure([row["seconds"] / ours[row["round"]]["seconds"] for row in measured]),
            "memory": figure([ours[row["round"]]["peak_rss_gib"] / row["peak_rss_gib"] for row in measured]),
        }
        for side, measured in rows.items()
        if side != "tunesmith"
    }


def reached(bar: Bar, found: Mapping[str, Any]) -> float | None:
    """The median that a bar is about; None where its side was not measured."""
    value: float
    if bar.what in ("speed", "memory"):
        against = found.get("against", {})
        if bar.side not in against:
            return None
        value = against[bar.side][bar.what]["median"]
    elif bar.what == "long":
        value = found["long"]["cost"]["median"]
    elif bar.what == "startup":
        value = found["startup"]["seconds"]["median"]
    else:
        value = found["sides"][bar.side]["gemm_share"]["median"]
    return value


def check_bars(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each bar of the case with the median that was reached."""
    checked = []
    for bar in BARS:
        value = reached(bar, found) if bar.case == found["key"] else None
        if value is not None:
            met = value >= bar.bound if bar.more_is_better else value <= bar.bound
            checked.append({**asdict(bar), "more_is_better": bar.more_is_better, "reached": value, "met": met})
    return checked


def peer_figures(case: Case, rows: Rows, gemm: Sequence[float], workload: Workload) -> dict[str, Any]:
    """A case of Tunesmith beside TRL."""
    batches = {batch: padded_tokens(workload.pairs, case.task.method, batch) for batch in (1, 4)}
    return {
        "sides": {side: side_figures(rows[side], gemm, task=case.task, workload=workload) for side in rows},
        "against": compare(rows),
        "equality": equality(rows),
        "padded_tokens": {f"batch {batch}": tokens for batch, tokens in batches.items()},
    }


def long_figures(case: Case, rows: Rows, gemm: Sequence[float], folder: Path) -> dict[str, Any]:
    """Case e: what a token of a long row costs, over what its arithmetic says."""
    work = {f"rows_{length}": load_workload(folder / f"rows_{length}.json") for length in (SHORT, LONG)}
    sides = {key: side_figures(rows[key], gemm, task=case.task, workload=work[key]) for key in rows}
    short, long = f"rows_{SHORT}", f"rows_{LONG}"
    arithmetic = [sides[key]["useful_gflop"] / sides[key]["useful_tokens"] for key in (short, long)]
    by_round = {row["round"]: row["seconds"] / sides[short]["useful_tokens"] for row in rows[short]}
    per_token = [row["seconds"] / sides[long]["useful_tokens"] / by_round[row["round"]] for row in rows[long]]
    ratio = arithmetic[1] / arithmetic[0]
    found = {"arithmetic": ratio, "time": figure(per_token), "cost": figure([value / ratio for value in per_token])}
    return {"sides": sides, "long": found}


def startup_figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Case f."""
    keys = ("seconds", "seconds_to_step", "step_seconds", "import_seconds")
    return {"startup": {key: figure([row[key] for row in rows]) for key in keys}}


def summarize(
    case: Case, done: Mapping[str, Any], *, folder: Path, workload: Workload, minutes: float
) -> dict[str, Any]:
    """All that `latest.json` holds of a case."""
    measurements, names = done["measurements"], done["names"]
    gemm = [max(rates.values()) for rates in done["gemm"]]
    rows = {side: [row for row in measurements if row["side"] == side] for side in names}
    if case.key == "e":
        figures = long_figures(case, rows, gemm, folder)
    elif case.key == "f":
        figures = startup_figures(rows["startup"])
    else:
        figures = peer_figures(case, rows, gemm, workload)
    found = {
        "key": case.key,
        "title": case.title,
        "task": asdict(case.task),
        "command": shlex.join(["make", "bench", *([f"ARGS={shlex.join(sys.argv[1:])}"] if sys.argv[1:] else [])]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "minutes": round(minutes, 1),
        "machine": machine(workload.num_threads),
        "load_before": figure([row["load_before"] for row in measurements]),
        "versions": {key: value for row in measurements for key, value in row.get("versions", {}).items()},
        "workload": {
            "pairs": len(workload.pairs),
            "pairs_per_step": workload.pairs_per_step,
            "steps": workload.num_steps,
            "seed": workload.seed,
            "rounds": len(gemm),
            "shape": vars(workload.shape),
        },
        "gemm_gflops": {shape: figure([rates[shape] for rates in done["gemm"]]) for shape in done["gemm"][0]},
        "names": names,
        "search": done["search"],
        **figures,
        "measurements": measurements,
    }
    return found | {"bars": check_bars(found)}


def put_table(page: Path, text: str, mark: str = "bench") -> None:
    """Replace what stands between the markers of `page`, `<!-- bench:begin -->` and its end or another pair."""
    begin, end = f"<!-- {mark}:begin -->", f"<!-- {mark}:end -->"
    content = page.read_text()
    before, found, rest = content.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"{page} has no {begin} ... {end}: the table is only in the results folder")
    page.write_text(f"{before}{begin}\n{text.rstrip()}\n{end}{after}")
