"""Predict and measure every configuration, one process each, one after another.

    python -m benchmarks.memory [NAME_PART ...]

In: the cases. Out: `benchmarks/results/memory.json`, and the table in docs/benchmarks.md between its markers.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.memory.cases import CASES, Case, make_model, recipe_of, write_rows
from benchmarks.report import machine, put_table

GIB = 2**30
RESULTS = Path(__file__).parents[1] / "results" / "memory.json"
PAGE = Path(__file__).parents[2] / "docs" / "benchmarks.md"
GOAL = 0.1


def measure(case: Case, folder: Path) -> dict[str, Any]:
    """Predicted and measured peak of a case, and the prediction's parts, in bytes."""
    work = Path(tempfile.mkdtemp(dir=folder))
    rows, recipe = work / "rows.jsonl", work / "recipe.json"
    write_rows(case, rows)
    recipe.write_text(json.dumps(recipe_of(case, make_model(case.size, folder), rows, work)))
    command = [sys.executable, "-m", "benchmarks.memory.worker", str(recipe)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return {"name": case.name, **json.loads(line.removeprefix("RESULT "))}
    return {"name": case.name, "failed": (done.stderr or done.stdout).strip().splitlines()[-1:][0][:300]}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: predicted, measured, error; how many are within the goal."""
    lines = ["| configuration | predicted, GiB | measured, GiB | error | highest in |", "|---|---|---|---|---|"]
    errors = []
    for row in rows:
        if "failed" in row:
            lines.append(f"| {row['name']} | - | - | failed: {row['failed']} | |")
            continue
        errors.append(row["predicted"] / row["measured"] - 1)
        phase = max(row["phases"], key=row["phases"].get)
        figures = f"{row['predicted'] / GIB:.3f} | {row['measured'] / GIB:.3f} | {errors[-1]:+.1%} | {phase}"
        lines.append(f"| {row['name']} | {figures} |")
    within = sum(abs(error) <= GOAL for error in errors)
    worst = max((abs(error) for error in errors), default=0.0)
    lines += ["", f"{within} of {len(rows)} within {GOAL:.0%}; the largest error is {worst:.1%}."]
    return "\n".join(lines) + "\n"


def write_page(page: Path = PAGE, results: Path = RESULTS) -> None:
    """Put the table of the last results between the page's markers `memory:begin` and `memory:end`."""
    put_table(page, table(json.loads(results.read_text())["cases"]), "memory")


def keep(row: dict[str, Any], results: Path = RESULTS) -> None:
    """Put one configuration's figures among the kept ones, in the cases' order; a run cut short keeps what it has."""
    rows = json.loads(results.read_text())["cases"] if results.is_file() else []
    by_name = {each["name"]: each for each in rows} | {row["name"]: row}
    ordered = [by_name[case.name] for case in CASES if case.name in by_name]
    results.write_text(json.dumps({"machine": machine(1), "cases": ordered}, indent=1) + "\n")


def main(parts: list[str]) -> None:
    """Measure the cases whose name contains one of `parts`, or all of them; every figure is kept as soon as it is."""
    chosen = [case for case in CASES if not parts or any(part in case.name for part in parts)]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for case in chosen:
            rows.append(measure(case, Path(folder)))
            keep(rows[-1])
            parts_gib = {name: round(size / GIB, 3) for name, size in rows[-1].get("parts", {}).items()}
            print(table(rows[-1:]).splitlines()[2], parts_gib, flush=True)
    print(table(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
