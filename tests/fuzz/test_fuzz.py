"""A part of `make fuzz` on every change: damaged files are refused with a message or read, within limits."""

from __future__ import annotations

import faulthandler
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.fuzz.mutate import damage_bytes, damage_json, damage_value
from tests.fuzz.run import LIMIT_BYTES, Target, fuzz, run_case
from tunesmith.errors import DataError

NUM_CASES = 300


def test_damaged_files_are_refused_or_read(tmp_path: Path, project: Path) -> None:
    """Other cases every time would tell more and hold up people whose change is right: `make fuzz` has those."""
    figures = tmp_path / "fuzz.json"
    command = [sys.executable, "-m", "tests.fuzz.run", "--cases", str(NUM_CASES), "--json", str(figures)]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=300, check=False)
    assert figures.is_file(), done.stderr[-3000:]
    found = json.loads(figures.read_text())
    assert found["failures"] == []
    assert found["cases"] >= 0.9 * NUM_CASES
    assert found["refused"] > 0.3 * NUM_CASES
    assert found["read"] > 0.1 * NUM_CASES


def test_the_same_draw_makes_the_same_damage() -> None:
    whole = {"a": [1, {"b": "text"}], "c": 2.5}
    data = json.dumps(whole).encode()
    for damage, value in ((damage_bytes, data), (damage_json, data), (damage_value, whole)):
        first, second = (damage(value, random.Random(9)) for _ in range(2))
        assert first == second
    assert whole == {"a": [1, {"b": "text"}], "c": 2.5}
    assert sum(damage_bytes(data, random.Random(seed)) == data for seed in range(200)) < 10


def _hang(folder: Path, draw: random.Random) -> None:
    end = time.process_time() + 60
    while time.process_time() < end:
        pass


def _crash(folder: Path, draw: random.Random) -> None:
    faulthandler.disable()  # its report would read like a failure of the test
    os.abort()


def _fill(folder: Path, draw: random.Random) -> None:
    bytearray(LIMIT_BYTES * 2)


def _trip(folder: Path, draw: random.Random) -> None:
    raise KeyError("x")


def _refuse(folder: Path, draw: random.Random) -> None:
    raise DataError("no")


@pytest.mark.parametrize(
    ("read", "result", "detail"),
    [
        (_hang, "failed", "more than its processor time"),
        (_crash, "failed", "ended with -6"),
        (_fill, "failed", "MemoryError"),
        (_trip, "failed", "KeyError"),
        (_refuse, "refused", ""),
        (lambda folder, draw: None, "read", ""),
    ],
    ids=["hang", "crash", "fill", "trip", "refuse", "read"],
)
def test_what_counts_as_failed(
    read: object, result: str, detail: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.fuzz.run.LIMIT_SECONDS", 0.2)
    figures = fuzz(Target("target", 1.0, read), 2, seed=0, folder=tmp_path / "case")  # type: ignore[arg-type]
    assert (figures.cases, {"failed": figures.failed, "refused": figures.refused, "read": figures.read}[result]) == (
        2,
        2,
    )
    assert all(detail in failure for failure in figures.failures)


def test_a_case_is_a_function_of_seed_and_number(tmp_path: Path) -> None:
    drawn: list[float] = []
    target = Target("target", 1.0, lambda folder, draw: drawn.append(draw.random()))
    for seed, number in ((0, 1), (0, 1), (0, 2), (1, 1)):
        run_case(target, number, seed=seed, folder=tmp_path / "case")
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) == 3
