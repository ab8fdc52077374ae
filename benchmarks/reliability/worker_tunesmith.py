"""Tunesmith's side: a stage through `run_recipe`, which is what the command calls. In: jobs. Out: see jobs.

python -m benchmarks.reliability.worker_tunesmith JOBS
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from benchmarks.reliability.jobs import BATCH, NUM_STEPS, SAVE_EVERY, WEIGHTS, Job, die, note_first_step, run_jobs
from tunesmith.cli.main import main as command
from tunesmith.pipeline import run as pipeline
from tunesmith.runs.records import Value
from tunesmith.train import checkpoint
from tunesmith.train.progress import Observer, PlainLines


class Killing(PlainLines):
    """Says what a run says; the process dies behind a step."""

    def __init__(self, killed_after: int | None) -> None:
        super().__init__(sys.stderr)
        self._killed_after = killed_after

    def started(self, stage: str, *, first_step: int, num_steps: int) -> None:
        note_first_step(first_step)
        super().started(stage, first_step=first_step, num_steps=num_steps)

    def stepped(self, record: Mapping[str, Value], timing: Mapping[str, Value]) -> None:
        super().stepped(record, timing)
        if record["step"] == self._killed_after:
            die()


def train(job: Job) -> None:
    """The command itself; only who watches is replaced."""
    method = job.system.split()[-1].lower()

    def watcher() -> Observer:
        return Killing(job.killed_after)

    pipeline.observer_for = watcher  # type: ignore[assignment]
    if job.killed_in_save is not None:
        _die_in_save(job.killed_in_save)
    stage = {
        "train": "[{path: rows.jsonl}]",
        "max_steps": NUM_STEPS,
        "batch_size": BATCH,
        "save_every": SAVE_EVERY,
        "learning_rate": job.learning_rate,
        "tuning": "{kind: lora, r: 4, dropout: 0.1}",
    }
    lines = [f"    {key}: {value}" for key, value in stage.items()]
    head = f"name: run\nmodel: {{path: {job.model!r}}}\nthreads: 1\nmemory: fixed\nstages:\n"
    Path("recipe.yaml").write_text(head + f"  - name: only\n    method: {method}\n" + "\n".join(lines) + "\n")
    try:
        command(["run", "recipe.yaml"])
    finally:
        made = Path("runs/run/stages/only/adapter/adapter_model.safetensors")
        if made.is_file():
            shutil.copy(made, WEIGHTS)


def _die_in_save(step: int) -> None:
    """The weights of that step's checkpoint are written, its optimizer is not."""
    save = checkpoint.save_file

    def save_or_die(tensors: object, path: Path) -> None:
        if f"step-{step}" in str(path) and path.name == checkpoint.OPTIMIZER:
            die()
        save(tensors, path)  # type: ignore[arg-type]

    checkpoint.save_file = save_or_die  # type: ignore[assignment]


if __name__ == "__main__":
    run_jobs(Path(sys.argv[1]), train)
