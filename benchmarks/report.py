"""From raw measurements to figures, a table, and the page that shows it.

In: measurements, GEMM rates, the workload. Out: the content of `latest.json`, and markdown.
Must not know: how anything was measured.
"""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.workload import Workload, padded_tokens, useful_flops, useful_tokens

Figure = dict[str, float]
LOSS_TOLERANCE = 1e-4
FLOORS = [  # (method, what, side compared with, bound): issue "the whole path, once", item 11
    ("dpo", "speed", "trl_default", 5.0),
    ("dpo", "speed", "trl_batch1", 3.0),
    ("dpo", "memory", "trl_default", 0.4),
    ("sft", "speed", "trl_default", 2.5),
    ("sft", "speed", "trl_batch1", 2.5),
]


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


def side_figures(rows: Sequence[Mapping[str, Any]], gemm: Sequence[float], workload: Workload) -> dict[str, Any]:
    """Figures of one side under one method; `gemm` is the machine's rate in each round, GFLOP/s."""
    method = rows[0]["method"]
    tokens, flops = useful_tokens(workload.pairs, method), useful_flops(workload.pairs, method, workload.shape)
    seconds = [row["seconds"] for row in rows]
    return {
        "seconds": figure(seconds),
        "cpu_seconds": figure([row["cpu_seconds"] for row in rows]),
        "rows_per_second": figure([len(workload.pairs) / value for value in seconds]),
        "tokens_per_second": figure([tokens / value for value in seconds]),
        "peak_rss_gib": figure([row["peak_rss_gib"] for row in rows]),
        "loaded_rss_gib": figure([row["loaded_rss_gib"] for row in rows]),
        "gemm_share": figure([flops / row["seconds"] / 1e9 / gemm[row["round"]] for row in rows]),
    }


def equality(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """How far the sides' losses lie apart: of the first step, and of all steps, where updates enter too."""
    ours = rows["tunesmith"][0]["losses"]
    gaps = [
        [abs(a - b) for a, b in zip(ours, row["losses"], strict=True)]
        for side, measured in rows.items()
        if side != "tunesmith"
        for row in measured
    ]
    first, every = max(gap[0] for gap in gaps), max(max(gap) for gap in gaps)
    return {
        "losses": {side: measured[0]["losses"] for side, measured in rows.items()},
        "first_step_difference": first,
        "largest_difference": every,
        "equal": first <= LOSS_TOLERANCE,
    }


def compare(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
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


def check_floors(methods: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each bound with the median that was reached."""
    checked = []
    for method, what, side, bound in FLOORS:
        if method not in methods:
            continue
        reached = methods[method]["against"][side][what]["median"]
        met = reached <= bound if what == "memory" else reached >= bound
        checked.append(
            {"method": method, "what": what, "against": side, "bound": bound, "reached": reached, "met": met}
        )
    return checked


def summarize(
    done: Mapping[str, Any], workload: Workload, *, names: Mapping[str, str], minutes: float
) -> dict[str, Any]:
    """All that `latest.json` holds."""
    measurements, pairs = done["measurements"], workload.pairs
    gemm = [max(rates.values()) for rates in done["gemm"]]
    methods: dict[str, Any] = {}
    for method in dict.fromkeys(row["method"] for row in measurements):
        rows = {
            side: [row for row in measurements if row["method"] == method and row["side"] == side] for side in names
        }
        methods[method] = {
            "sides": {side: {"name": names[side], **side_figures(rows[side], gemm, workload)} for side in names},
            "against": compare(rows),
            "equality": equality(rows),
            "useful_tokens": useful_tokens(pairs, method),
            "useful_gflop": useful_flops(pairs, method, workload.shape) / 1e9,
            "padded_tokens": {"batch 4": padded_tokens(pairs, method, 4), "batch 1": padded_tokens(pairs, method, 1)},
        }
    return {
        "schema": 1,
        "command": "make bench",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "minutes": round(minutes, 1),
        "machine": machine(workload.num_threads),
        "load_before": figure([row["load_before"] for row in measurements]),
        "versions": {key: value for row in measurements for key, value in row["versions"].items()},
        "workload": {
            "pairs": len(pairs),
            "pairs_per_step": workload.pairs_per_step,
            "steps": workload.num_steps,
            "seed": workload.seed,
            "rounds": len(gemm),
            "shape": vars(workload.shape),
        },
        "gemm_gflops": {shape: figure([rates[shape] for rates in done["gemm"]]) for shape in done["gemm"][0]},
        "methods": methods,
        "floors": check_floors(methods),
        "measurements": measurements,
    }


def _cell(values: Figure, digits: int = 2, scale: float = 1.0, unit: str = "") -> str:
    low, middle, high = (f"{values[key] * scale:,.{digits}f}" for key in ("min", "median", "max"))
    return f"**{middle}{unit}** ({low}-{high})"


def _method_table(method: str, content: Mapping[str, Any]) -> list[str]:
    unit = "pairs/s" if method == "dpo" else "rows/s"
    lines = [
        f"| {method.upper()} | {unit} | useful tokens/s | peak RSS, GiB | of it loaded | share of GEMM rate "
        "| Tunesmith is |",
        "|---|---|---|---|---|---|---|",
    ]
    for side, row in content["sides"].items():
        ratio = "" if side == "tunesmith" else f"{_cell(content['against'][side]['speed'])} times as fast"
        memory = "" if side == "tunesmith" else f", {content['against'][side]['memory']['median']:.2f} of its memory"
        cells = [
            row["name"],
            _cell(row["rows_per_second"], 3),
            _cell(row["tokens_per_second"], 0),
            _cell(row["peak_rss_gib"]),
            f"{row['loaded_rss_gib']['median']:.2f}",
            _cell(row["gemm_share"], 0, 100.0, " %"),
            ratio + memory,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def table(result: Mapping[str, Any]) -> str:
    """The tables in markdown, with what they were measured on, and whether both sides did the same work."""
    here, versions, work = result["machine"], result["versions"], result["workload"]
    rates = "; ".join(f"{shape}: {_cell(values, 0)}" for shape, values in result["gemm_gflops"].items())
    lines = [
        f"`{result['command']}`, {result['date']}: {work['rounds']} rounds of {work['steps']} steps x "
        f"{work['pairs_per_step']} pairs, {result['minutes']:.0f} minutes. {here['cpu']}, {here['cores']} shared "
        f"cores, {here['threads']} threads, {here['memory_gib']} GiB, no GPU; load before a measurement "
        f"{result['load_before']['min']:.1f} to {result['load_before']['max']:.1f}. Tunesmith {versions['tunesmith']}, "
        f"TRL {versions['trl']}, torch {versions['torch']}, transformers {versions['transformers']}. "
        "Bold is the median, in brackets minimum and maximum.",
        "",
        f"GEMM rate, GFLOP/s, float32: {rates}.",
    ]
    for method, content in result["methods"].items():
        same = content["equality"]
        lines += ["", *_method_table(method, content), ""]
        lines.append(
            f"Equal work ({method.upper()}): first losses {same['losses']['tunesmith'][0]:.6f} (Tunesmith) and TRL's "
            f"differ by at most {same['first_step_difference']:.1e}, the losses of all steps by at most "
            f"{same['largest_difference']:.1e}: {'the same' if same['equal'] else 'NOT the same'} work."
        )
    lines.append("")
    for floor in result["floors"]:
        name = result["methods"][floor["method"]]["sides"][floor["against"]]["name"]
        bound = f"{'at most' if floor['what'] == 'memory' else 'at least'} {floor['bound']}"
        reached = f"{floor['reached']:.2f}, wanted {bound}: {'met' if floor['met'] else 'NOT met'}"
        lines.append(f"- {floor['method'].upper()} {floor['what']} against {name}: {reached}")
    return "\n".join(lines) + "\n"


def put_table(page: Path, text: str, mark: str = "bench") -> None:
    """Replace what stands between the markers of `page`, `<!-- bench:begin -->` and its end or another pair."""
    begin, end = f"<!-- {mark}:begin -->", f"<!-- {mark}:end -->"
    content = page.read_text()
    before, found, rest = content.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"{page} has no {begin} ... {end}: the table is only in the results folder")
    page.write_text(f"{before}{begin}\n{text.rstrip()}\n{end}{after}")
