"""Damaged files for everything that reads one: refused with a message or read, within limits, and nothing else.

    python -m tests.fuzz.run [--cases 10000] [--seed 0] [--target NAME] [--json FILE]
    python -m tests.fuzz.run --target NAME --case N     one case again, in this process, with its traceback

Every case is a function of (seed, target, number). Cases run in a child that may take LIMIT_SECONDS of processor time
each and LIMIT_BYTES of memory on top of what it has after its imports; a child that dies is a failed case, and the next
child goes on behind it. Prints one JSON object; exit 1 where a case failed.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tunesmith.errors import TunesmithError

LIMIT_SECONDS = 5.0  # of processor time a case
LIMIT_WALL_SECONDS = 60.0  # the same for a case that only waits; machines are shared
LIMIT_BYTES = 1 << 30  # what a child may take on top of its imports

Result = Literal["refused", "read", "failed"]


@dataclass(frozen=True, slots=True)
class Target:
    """Something that reads files. `read` damages a copy in the folder it is given and reads it, once a case."""

    name: str
    share: float
    read: Callable[[Path, random.Random], None]


@dataclass(slots=True)
class Figures:
    """What came out of a target's cases."""

    cases: int = 0
    refused: int = 0
    read: int = 0
    failed: int = 0
    slowest_seconds: float = 0.0
    failures: list[str] = field(default_factory=list)

    def add(self, result: Result, seconds: float, detail: str) -> None:
        """Count a case."""
        self.cases += 1
        self.refused += result == "refused"
        self.read += result == "read"
        self.failed += result == "failed"
        self.slowest_seconds = max(self.slowest_seconds, seconds)
        if result == "failed":
            self.failures.append(detail)


def run_case(target: Target, number: int, *, seed: int, folder: Path) -> None:
    """One case; raises what the reader raises."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    draw = random.Random(f"{seed} {target.name} {number}")
    here = Path.cwd()
    os.chdir(folder)
    try:
        target.read(folder, draw)
    finally:
        os.chdir(here)


def fuzz(target: Target, cases: int, *, seed: int, folder: Path) -> Figures:
    """All cases of a target, in as many children as it takes."""
    figures = Figures()
    while figures.cases < cases:
        for result, seconds, detail in _child(target, range(figures.cases, cases), seed=seed, folder=folder):
            figures.add(result, seconds, detail)
    return figures


def _child(target: Target, numbers: range, *, seed: int, folder: Path) -> Iterator[tuple[Result, float, str]]:
    """The cases' results, up to the first that kills the child."""
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        _work(target, numbers, seed=seed, folder=folder, writer=writer)
    os.close(writer)
    done = 0
    with os.fdopen(reader) as lines:
        for line in lines:
            result, seconds, detail = json.loads(line)
            done += 1
            yield result, seconds, detail
    _, status = os.waitpid(pid, 0)
    if done < len(numbers):
        code = os.waitstatus_to_exitcode(status)
        death = "used more than its processor time" if code == -signal.SIGPROF else f"its process ended with {code}"
        yield "failed", LIMIT_SECONDS, f"{target.name} {numbers[done]}: {death}"


def _work(target: Target, numbers: range, *, seed: int, folder: Path, writer: int) -> None:
    """The child: never returns."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process, also inside a library that never returns
    most = _virtual_bytes() + LIMIT_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number in numbers:
        signal.setitimer(signal.ITIMER_PROF, LIMIT_SECONDS)
        faulthandler.dump_traceback_later(LIMIT_WALL_SECONDS, exit=True)
        begin = time.process_time()
        try:
            run_case(target, number, seed=seed, folder=folder)
            result, detail = "read", ""
        except TunesmithError as error:
            result, detail = "refused", str(error)[:200]
        except BaseException as error:
            frames = traceback.extract_tb(error.__traceback__)
            ours = [frame for frame in frames if "tunesmith" in frame.filename] or list(frames)
            place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"
            result, detail = "failed", f"{target.name} {number}: {place}: {type(error).__name__}: {str(error)[:200]}"
        signal.setitimer(signal.ITIMER_PROF, 0)
        faulthandler.cancel_dump_traceback_later()
        os.write(writer, json.dumps([result, time.process_time() - begin, detail]).encode() + b"\n")
    os._exit(0)


def _virtual_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def fuzz_all(targets: list[Target], cases: int, *, seed: int, folder: Path) -> dict[str, object]:
    """Every target's part of the cases; the object that is printed."""
    whole = sum(target.share for target in targets)
    found: dict[str, Figures] = {}
    for target in targets:
        own = max(1, round(cases * target.share / whole))
        found[target.name] = fuzz(target, own, seed=seed, folder=folder / "case")
        print(f"{target.name}: {found[target.name].cases} cases, {found[target.name].failed} failed", file=sys.stderr)
    return {
        "seed": seed,
        "cases": sum(figures.cases for figures in found.values()),
        "refused": sum(figures.refused for figures in found.values()),
        "read": sum(figures.read for figures in found.values()),
        "failed": sum(figures.failed for figures in found.values()),
        "cpu_seconds_limit": LIMIT_SECONDS,
        "memory_mib_limit": LIMIT_BYTES >> 20,
        "targets": {
            name: {
                "cases": figures.cases,
                "refused": figures.refused,
                "read": figures.read,
                "failed": figures.failed,
                "slowest_seconds": round(figures.slowest_seconds, 2),
            }
            for name, figures in found.items()
        },
        "failures": [failure for figures in found.values() for failure in figures.failures],
    }


def main() -> int:
    """See the module."""
    from tests.fuzz.targets import make_targets

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", help="only this one")
    parser.add_argument("--case", type=int, help="only this case, in this process")
    parser.add_argument("--json", type=Path, help="write the printed object here too")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tunesmith-fuzz-") as name:
        os.environ["XDG_CACHE_HOME"] = str(Path(name) / "caches")
        targets = make_targets(Path(name), given.target)
        if given.case is not None:
            run_case(targets[0], given.case, seed=given.seed, folder=Path(name) / "case")
            return 0
        found = fuzz_all(targets, given.cases, seed=given.seed, folder=Path(name))
    text = json.dumps(found, indent=2)
    print(text)
    if given.json is not None:
        given.json.write_text(text + "\n")
    return 1 if found["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
