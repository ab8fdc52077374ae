"""R7: a checkpoint of every release goes on in this one, to the records of a run that never stopped.

The checkpoints lie in tests/fixtures; `python -m tests.support.release_checkpoint` makes those of the next release.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support.release_checkpoint import FOLDER, NUM_STEPS, SAVED_STEP, STAGES, engine
from tests.support.training import Trial
from tunesmith.runs.records import read_records
from tunesmith.train.checkpoint import find_problem, load_checkpoint
from tunesmith.version import VERSION

MADE = sorted(path for path in FOLDER.glob("*/*") if path.is_dir())
LARGEST_BYTES = 100_000


def test_this_release_has_one() -> None:
    assert {path.name for path in (FOLDER / VERSION).iterdir()} == STAGES.keys()


@pytest.mark.parametrize("path", MADE, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_it_goes_on(path: Path, tmp_path: Path) -> None:
    shutil.copytree(path, tmp_path / "stage")
    (tmp_path / "stage" / "expected.jsonl").unlink()
    assert find_problem(tmp_path / f"stage/checkpoints/step-{SAVED_STEP}") == ""
    outcome, _ = Trial(tmp_path / "stage", STAGES[path.name]).run(engine=engine())
    assert (outcome.resumed_step, outcome.num_steps) == (SAVED_STEP, NUM_STEPS)
    found, expected = read_records(tmp_path / "stage/metrics.jsonl"), read_records(path / "expected.jsonl")
    assert [record["step"] for record in found] == list(range(1, NUM_STEPS + 1))
    for one, other in zip(found, expected, strict=True):
        # rounding of other machines and torches; a fresh optimizer or schedule is off by 1e-2 and more
        assert {name: one[name] for name in other} == pytest.approx(other, rel=2e-4, abs=2e-4)
    last = load_checkpoint(tmp_path / f"stage/checkpoints/step-{NUM_STEPS}")
    assert all(float(step) == NUM_STEPS for name, step in last.optimizer.items() if name.startswith("step."))


@pytest.mark.parametrize("path", sorted({path.parent for path in MADE}), ids=lambda path: path.name)
def test_they_are_small(path: Path) -> None:
    assert sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) < LARGEST_BYTES
