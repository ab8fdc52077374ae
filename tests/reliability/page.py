"""The page of reliability: what is promised, what was done to a run, what came out, and which test says so.

    python -m tests.reliability.page                run every named test (two at a time), then write docs/reliability.md
    python -m tests.reliability.page --junit FILE   take the results of a run of pytest with --junitxml=FILE instead
    python -m tests.reliability.page --write        only write the page, with the results as they were last found

In: rows of `tests/reliability/<letter>.json`, results of tests, figures under `benchmarks/results`. Out: the page, and
`passes.json` with the date of each test's last pass. Exit 1 where a test failed, does not exist, or a row has none.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import json
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.reliability.catalogue import FAULTS, LATER, PROMISES, REQUIRED, THREATS, TRAPS

PROJECT = Path(__file__).resolve().parents[2]
FOLDER = Path(__file__).resolve().parent
PAGE = PROJECT / "docs/reliability.md"
PASSES = FOLDER / "passes.json"
FIGURES = PROJECT / "benchmarks/results"
FIELDS = ("id", "fault", "result", "test")

INTRODUCTION = """# Reliability

What is promised of a run, what was done to it, what came out, and which test says so. This page is written by
`python -m tests.reliability.page`, which runs every test that it names: the date is that of the test's last pass.
"""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the page: a fault of the catalogue, what was done exactly, what came out, the test of it."""

    id: str
    fault: str
    result: str
    test: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a test last did, and the day on which it last passed (empty: never)."""

    last: str
    passed_on: str


def read_rows(folder: Path = FOLDER) -> list[Row]:
    """Every part's rows, part by part. Raises ValueError where a file is no list of rows."""
    rows: list[Row] = []
    for path in sorted(folder.glob("?.json")):
        for entry in json.loads(path.read_text("utf-8")):
            if not isinstance(entry, dict) or set(entry) != set(FIELDS):
                raise ValueError(f"{path.name}: {entry!r} has not exactly the fields {', '.join(FIELDS)}")
            rows.append(Row(**{name: str(entry[name]) for name in FIELDS}))
    return rows


def missing_tests(rows: Iterable[Row], project: Path = PROJECT) -> list[str]:
    """Named tests that do not exist, with what is wrong."""
    functions: dict[str, set[str]] = {}
    wrong = []
    for test in sorted({row.test for row in rows}):
        file, _, name = test.partition("::")
        if file not in functions:
            path = project / file
            functions[file] = _test_names(path) if path.is_file() else set()
        if name.partition("[")[0] not in functions[file]:
            wrong.append(test)
    return wrong


def _test_names(path: Path) -> set[str]:
    tree = ast.parse(path.read_text("utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def unanswered(rows: Iterable[Row]) -> list[str]:
    """Ids of the catalogue that no row speaks of."""
    answered = {row.id for row in rows}
    return [name for name in REQUIRED if name not in answered]


# --- results


def run_tests(tests: Sequence[str], junit: Path) -> None:
    """Run the tests; their results are in `junit` afterwards."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", f"--junitxml={junit}", *tests]
    subprocess.run(command, cwd=PROJECT, check=False)


def read_junit(path: Path) -> dict[str, str]:
    """`passed`, `failed` or `skipped` for every test, with and without its parameters; the worst one stands for all."""
    worst = ("passed", "skipped", "failed")
    found: dict[str, str] = {}
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        file = case.get("classname", "").replace(".", "/") + ".py"
        name = case.get("name", "")
        kinds = {child.tag for child in case}
        result = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        for key in {f"{file}::{name}", f"{file}::{name.partition('[')[0]}"}:
            # one skipped variant (no GPU here) does not hide that the others passed
            both = {found.get(key, result), result}
            found[key] = "passed" if both == {"passed", "skipped"} else max(both, key=worst.index)
    return found


def read_passes(path: Path = PASSES) -> dict[str, Outcome]:
    """The outcomes that are kept."""
    if not path.is_file():
        return {}
    return {test: Outcome(**entry) for test, entry in json.loads(path.read_text("utf-8")).items()}


def merged(
    before: Mapping[str, Outcome], results: Mapping[str, str], tests: Iterable[str], *, day: str
) -> dict[str, Outcome]:
    """The outcomes after a run of tests; a test that did not run keeps what it had."""
    after = {}
    for test in sorted(set(tests)):
        old = before.get(test, Outcome("not run", ""))
        last = results.get(test, old.last)
        after[test] = Outcome(last, day if results.get(test) == "passed" else old.passed_on)
    return after


def write_passes(passes: Mapping[str, Outcome], path: Path = PASSES) -> None:
    """Keep the outcomes."""
    content = {test: {"last": outcome.last, "passed_on": outcome.passed_on} for test, outcome in passes.items()}
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")


# --- the page


def render(rows: Sequence[Row], passes: Mapping[str, Outcome], *, figures: Path = FIGURES) -> str:
    """The whole page."""
    parts = [
        INTRODUCTION,
        "## Promises\n",
        _table(PROMISES, rows, passes, head="promise"),
        "## Faults\n",
        _table(FAULTS, rows, passes, head="fault"),
        "## Threats\n",
        _table(THREATS, rows, passes, head="threat"),
        "## Traps that others fell into\n",
        _table(TRAPS, rows, passes, head="trap"),
        *_soak(figures / "soak.json"),
        *_fuzz(figures / "fuzz.json"),
        *_peers(figures / "reliability.json"),
        "## Not promised yet\n",
        "\n".join(f"- **{name}**: {text}" for name, text in LATER.items()) + "\n",
    ]
    return "\n".join(parts)


def _table(texts: Mapping[str, str], rows: Sequence[Row], passes: Mapping[str, Outcome], *, head: str) -> str:
    lines = [f"| | {head} | what is done | what comes out | test | last pass |", "|---|---|---|---|---|---|"]
    for name, text in texts.items():
        own = [row for row in rows if row.id == name]
        for number, row in enumerate(own):
            first = (f"**{name}**", text) if number == 0 else ("", "")
            cells = (*first, row.fault, row.result, _link(row.test), _passed(passes.get(row.test)))
            lines.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
        if not own and name in REQUIRED:
            lines.append(f"| **{name}** | {text} | | **no test** | | |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _link(test: str) -> str:
    file, _, name = test.partition("::")
    return f"[{name}](../{file})"


def _passed(outcome: Outcome | None) -> str:
    if outcome is None or not outcome.passed_on:
        return f"**{outcome.last if outcome else 'not run'}**"
    return outcome.passed_on if outcome.last == "passed" else f"**{outcome.last}**, last {outcome.passed_on}"


def _figures(path: Path) -> dict[str, object]:
    content = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    assert isinstance(content, dict)
    return content


def _soak(path: Path) -> list[str]:
    """`make soak` prints one JSON object; every plain figure of it is shown."""
    content = _figures(path)
    lines = ["| figure | value |", "|---|---|"]
    lines += [f"| {_words(key)} | {_value(value) or 'none'} |" for key, value in content.items() if value is not None]
    text = "Real runs of two stages, killed at drawn instants, started again, their last bytes compared (`make soak`)."
    return ["## Kill soak\n", text + "\n", "\n".join(lines) + "\n"] if content else []


def _fuzz(path: Path) -> list[str]:
    content = _figures(path)
    if not content:
        return []
    seconds, mebibytes = content["cpu_seconds_limit"], content["memory_mib_limit"]
    text = (
        f"`make fuzz` gives {content['cases']:,} damaged recipes, rows, checkpoints, manifests, results, adapters and"
        f" models to what reads them. {content['refused']:,} were refused with a message, {content['read']:,} were"
        f" still right and read; {content['failed']:,} failed (a traceback, more than {seconds:g} s of"
        f" processor time, or more than {mebibytes:,} MiB on top of the imports)."
    )
    targets = content["targets"]
    assert isinstance(targets, dict)
    lines = ["| what is damaged | cases | refused | read | failed | slowest, s |", "|---|---|---|---|---|---|"]
    for name, entry in targets.items():
        cells = (entry["cases"], entry["refused"], entry["read"], entry["failed"], f"{entry['slowest_seconds']:.2f}")
        lines.append(f"| {_words(name)} | " + " | ".join(str(cell) for cell in cells) + " |")
    return ["## Fuzz\n", text + "\n", "\n".join(lines) + "\n"]


def _peers(path: Path) -> list[str]:
    content = _figures(path)
    if not content:
        return []
    systems, faults, versions = content["systems"], content["faults"], content["versions"]
    assert isinstance(systems, list) and isinstance(faults, list) and isinstance(versions, dict)
    shown = ", ".join(f"{name} {version}" for name, version in versions.items())
    text = (
        f"The same faults done to the same tiny model and rows by `python -m benchmarks.reliability.compare` ({shown})."
        " Every cell is what happened in a real run: stopped after a checkpoint, damaged, started again in the way that"
        " each project documents."
    )
    lines = ["| fault | " + " | ".join(systems) + " |", "|---" * (len(systems) + 1) + "|"]
    for fault in faults:
        cells = [fault["fault"], *(fault["outcomes"][system] for system in systems)]
        lines.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    return ["## The same faults elsewhere\n", text + "\n", "\n".join(lines) + "\n"]


def _words(name: str) -> str:
    return name.replace("_", " ")


def _value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, dict):
        return ", ".join(f"{_words(str(key))} {_value(inner)}" for key, inner in value.items())
    return ", ".join(_value(inner) for inner in value) if isinstance(value, list) else str(value)


def main(arguments: Sequence[str] | None = None) -> int:
    """Find the results, write the page; 1 where it tells of a hole."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--junit", type=Path, help="results of an earlier run of pytest")
    parser.add_argument("--write", action="store_true", help="write the page only")
    given = parser.parse_args(arguments)
    rows = read_rows()
    absent = missing_tests(rows)
    tests = sorted({row.test for row in rows} - set(absent))
    passes = read_passes()
    if not given.write:
        with tempfile.TemporaryDirectory() as folder:
            junit = given.junit or Path(folder) / "junit.xml"
            if given.junit is None:
                run_tests(tests, junit)
            passes = merged(passes, read_junit(junit), tests, day=datetime.date.today().isoformat())
        write_passes(passes)
    PAGE.write_text(render(rows, passes), "utf-8")
    holes = [f"no row: {name}" for name in unanswered(rows)] + [f"no such test: {test}" for test in absent]
    holes += [f"{outcome.last}: {test}" for test, outcome in passes.items() if outcome.last != "passed"]
    print(f"{PAGE.relative_to(PROJECT)}: {len(rows)} rows, {len(tests)} tests, {len(holes)} holes")
    print("\n".join(f"  {hole}" for hole in holes))
    return 1 if holes else 0


if __name__ == "__main__":
    sys.exit(main())
