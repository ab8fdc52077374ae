"""Trainings that are broken off and gone on with, each in a process of its own, forked from one that has imported all.

In: jobs as JSON. Out: beside each job's files its log, and what it ended with. Must not know: whose training it is.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

LOG = "job.log"
ENDED = "ended.json"
WEIGHTS = "final.safetensors"

NUM_STEPS = 8
SAVE_EVERY = 2
KILLED_AFTER = 5  # the newest checkpoint is then that of step 4
KILLED_IN_SAVE_OF = 4
BATCH = 4
NUM_ROWS = 32  # one epoch: every row is trained once


@dataclass(frozen=True, slots=True)
class Job:
    """One start of a training in `folder`, which holds rows.jsonl and what an earlier start left."""

    system: str
    folder: str
    model: str
    resume: bool = False
    learning_rate: float = 1e-3
    killed_after: int | None = None
    killed_in_save: int | None = None

    @property
    def path(self) -> Path:
        """The folder."""
        return Path(self.folder)


@dataclass(frozen=True, slots=True)
class Ended:
    """How a job ended: its exit code (negative: a signal), and the step that it went on from, where it said so."""

    code: int
    first_step: int | None


def write_jobs(path: Path, jobs: list[Job]) -> None:
    """For `run_jobs` in another environment."""
    path.write_text(json.dumps([asdict(job) for job in jobs]))


def run_jobs(path: Path, train: Callable[[Job], None]) -> None:
    """Every job in a child. `train` runs in the job's folder, saves final.safetensors, and may be killed."""
    for values in json.loads(path.read_text()):
        job = Job(**values)
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            _child(job, train)
        _, status = os.waitpid(pid, 0)
        begun = job.path / "first_step"
        ended = Ended(os.waitstatus_to_exitcode(status), int(begun.read_text()) if begun.is_file() else None)
        (job.path / ENDED).write_text(json.dumps(asdict(ended)))


def read_ended(folder: Path) -> Ended:
    """What `run_jobs` wrote."""
    return Ended(**json.loads((folder / ENDED).read_text()))


def note_first_step(step: int) -> None:
    """Called by a training, in the job's folder, when it knows where it begins."""
    Path("first_step").write_text(str(step))


def die() -> None:
    """As `kill -9` does it."""
    os.kill(os.getpid(), signal.SIGKILL)


def _child(job: Job, train: Callable[[Job], None]) -> None:
    code = 1
    try:
        os.chdir(job.folder)
        log = os.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        train(job)
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
