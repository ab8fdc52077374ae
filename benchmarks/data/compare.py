"""Preparation of rows, Tunesmith and TRL in turn, and of a large file within a memory bound; prints the table.

In: counts and rounds. Out: `results/data.json` (full size) or `work/data.json`, and the table in `docs/benchmarks.md`.
Must not know: how either side works.

    make bench-data                                       # 100,000 rows of each kind, 3 rounds, and a file of 2 GB
    make bench-data ARGS="--rows 5000 --rounds 1 --large-bytes 0"
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.data.rows import write_rows
from benchmarks.report import put_table

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SHARED = ROOT.parent / "shared" / "data"
FULL = {"rows": 100_000, "rounds": 3, "large_bytes": 2 * 10**9}
WANTED_SPEED, WANTED_START_SECONDS, WANTED_GIB = 5.0, 2.0, 1.5
METHODS = ("sft", "dpo")
MARK = "data"


def measure(side: str, method: str, rows: Path, *, peer: str, processes: int) -> dict[str, float]:
    """One measurement in a process of its own."""
    python = peer if side == "trl" else sys.executable
    out = rows.with_suffix(f".{side}.json")
    command = [python, "-m", f"benchmarks.data.worker_{side}", "--method", method, "--rows", str(rows)]
    command += ["--tokenizer", str(SHARED / "tokenizers" / "qwen2_hf"), "--processes", str(processes)]
    command += ["--template", str(SHARED / "templates" / "Qwen-Qwen2.5-7B-Instruct.jinja"), "--out", str(out)]
    environment = {key: value for key, value in os.environ.items() if key != "TOKENIZERS_PARALLELISM"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with code {done.returncode}:\n{done.stderr[-3000:]}")
    result: dict[str, float] = json.loads(out.read_text())
    return result


def compare(args: argparse.Namespace, folder: Path) -> list[dict[str, object]]:
    """Every round: ours, TRL in one process, TRL in as many as there are cores; backwards every other round."""
    sides = [("tunesmith", 0), ("trl", 1), ("trl", os.cpu_count() or 1)]
    found: list[dict[str, object]] = []
    for method in METHODS:
        rows = folder / f"{method}.jsonl"
        write_rows(rows, method, shared=SHARED, num_rows=args.rows)
        for number in range(args.rounds):
            for side, processes in sides if number % 2 == 0 else sides[::-1]:
                result = measure(side, method, rows, peer=args.peer_python, processes=processes)
                found.append({"method": method, "side": side, "processes": processes, "round": number, **result})
                speed = result["rows"] / result["seconds"]
                print(f"  {method} {side} ({processes or 'auto'} processes): {speed:,.0f} rows/s", flush=True)
    return found


def large(args: argparse.Namespace, folder: Path) -> dict[str, object]:
    """A run on one large file, with the memory that it took."""
    rows = folder / "large.jsonl"
    write_rows(rows, "sft", shared=SHARED, num_bytes=args.large_bytes)
    out = rows.with_suffix(".json")
    command = [sys.executable, "-m", "benchmarks.data.worker_train", "--rows", str(rows), "--out", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    result: dict[str, object] = json.loads(out.read_text())
    return result


def table(done: dict[str, object], command: str) -> str:
    """The figures in Markdown: medians, least and most."""
    found = done["measurements"]
    assert isinstance(found, list)
    lines = [f"`{command}`, {done['date']}, {os.cpu_count()} shared cores.", ""]
    lines += ["| rows | who | rows/s | peak RSS, GiB | Tunesmith is |", "|---|---|---|---|---|"]
    speeds: dict[tuple[str, str, int], list[float]] = {}
    memory: dict[tuple[str, str, int], float] = {}
    for each in found:
        key = (each["method"], each["side"], each["processes"])
        speeds.setdefault(key, []).append(each["rows"] / each["seconds"])
        memory[key] = max(memory.get(key, 0.0), each["peak_rss_gib"])
    words = {"sft": "conversations", "dpo": "pairs"}
    for (method, side, processes), values in speeds.items():
        ours = speeds[method, "tunesmith", 0]
        ratios = [one / other for one, other in zip(ours, values, strict=True)]
        ratio = "" if side == "tunesmith" else f"**{statistics.median(ratios):.1f}** times as fast"
        who = "Tunesmith" if side == "tunesmith" else f"TRL, {processes} process{'es' if processes > 1 else ''}"
        middle = f"**{statistics.median(values):,.0f}** ({min(values):,.0f}-{max(values):,.0f})"
        lines.append(f"| {words[method]} | {who} | {middle} | {memory[method, side, processes]:.2f} | {ratio} |")
    starts = [each["second_start"] for each in found if each["side"] == "tunesmith"]
    lines += [
        "",
        f"- second start, from the cache: {max(starts):.2f} s at most (wanted under {WANTED_START_SECONDS:g})",
    ]
    for method in METHODS:
        ratios = [o / t for o, t in zip(speeds[method, "tunesmith", 0], speeds[method, "trl", 1], strict=True)]
        met = "met" if statistics.median(ratios) >= WANTED_SPEED else "NOT met"
        lines.append(f"- {words[method]}: wanted {WANTED_SPEED:g} times TRL's preparation: {met}")
    big = done.get("large")
    if isinstance(big, dict):
        lines.append(
            f"- a file of {big['bytes'] / 1e9:.2f} GB, prepared and trained on for {big['steps']} steps in "
            f"{big['seconds']:.0f} s: {big['trained_rows']:,} rows in {big['store_bytes'] / 2**30:.2f} GiB of mapped "
            f"trees; private memory of all processes together at most {big['preparing_gib']:.2f} GiB while rows were "
            f"prepared (wanted under {WANTED_GIB:g}), {big['peak_private_gib']:.2f} in all, under a hard limit of "
            f"{big['limit_gib']:g} GiB each; largest RSS of a process, mapped pages included, "
            f"{big['peak_rss_gib']:.2f} GiB"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=FULL["rows"])
    parser.add_argument("--rounds", type=int, default=FULL["rounds"])
    parser.add_argument("--large-bytes", type=int, default=FULL["large_bytes"], help="0 leaves the large file out")
    parser.add_argument("--peer-python", default=str(HERE.parent / ".venv-bench" / "bin" / "python"))
    args = parser.parse_args()
    if not SHARED.is_dir():
        raise SystemExit("no real data: ../shared/data is absent")
    with tempfile.TemporaryDirectory(prefix="tunesmith-bench-data-") as name:
        done: dict[str, object] = {"date": time.strftime("%Y-%m-%d"), "measurements": compare(args, Path(name))}
        if args.large_bytes:
            done["large"] = large(args, Path(name))
    full = all(vars(args)[key] >= least for key, least in FULL.items())
    out = HERE.parent / ("results" if full else "work") / "data.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(done, indent=1) + "\n")
    shown = " ".join(f"--{key.replace('_', '-')} {vars(args)[key]}" for key in FULL if vars(args)[key] != FULL[key])
    text = table(done, f"make bench-data{f' ARGS={shown!r}' if shown else ''}")
    if full:
        put_table(ROOT / "docs" / "benchmarks.md", text, MARK)
    print(f"\n{text}\nWritten to {out.relative_to(ROOT)}.")


if __name__ == "__main__":
    main()
