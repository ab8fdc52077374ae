"""What a person sees of a run, written to the run's log as well, errors included; secrets reach neither.

In: the events of an observer. Out: the same to the observer within, and lines in log.jsonl once the run folder is
there. Must not know: what the events mean.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tunesmith.errors import StoppedError, TunesmithError
from tunesmith.redact import redact
from tunesmith.runs.log import Detail, Level, RunLog
from tunesmith.runs.records import Value
from tunesmith.train.progress import Observer, describe, describe_evaluation

STEP_SECONDS = 30.0
"""A step is logged when none was for so long, and the last: every step is in metrics.jsonl."""
MAX_WAITING = 1000
"""Events kept until there is a folder to write them to."""


class Logged:
    """An observer around another. Errors of the log are said once and stop nothing; those of the observer within are
    its own affair."""

    def __init__(self, inner: Observer, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._inner = inner
        self._clock = clock
        self._log: RunLog | None = None
        self._waiting: list[tuple[Level, str, float, dict[str, Detail]]] = []
        self._stage, self._step, self._num_steps = "", 0, 0
        self._last_step_at = -STEP_SECONDS

    @contextmanager
    def writing(self, folder: Path) -> Iterator[None]:
        """Write to the log of `folder` while the block lasts, first what was said before; an error that leaves the
        block is the last event."""
        self._log = RunLog(folder)
        waiting, self._waiting = self._waiting, []
        try:
            for level, text, at, details in waiting:
                self._write(level, text, at=at, details=details)
            yield
            self._event("info", "the run is finished")
        except StoppedError as error:
            self._event("warning", error.message(), kind="StoppedError")
            raise
        except BaseException as error:
            message = error.message() if isinstance(error, TunesmithError) else f"{error}"
            trace = "".join(traceback.format_exception(error))
            self._event("error", message, kind=type(error).__name__, traceback=redact(trace))
            raise
        finally:
            self._log = None

    def started(self, stage: str, *, first_step: int, num_steps: int) -> None:
        """A stage begins."""
        self._stage, self._step, self._num_steps = stage, first_step, num_steps
        self._last_step_at = -STEP_SECONDS
        again = f", going on after step {first_step}" if first_step else ""
        self._event("info", f"{num_steps} steps{again}")
        self._inner.started(stage, first_step=first_step, num_steps=num_steps)

    def stepped(self, record: Mapping[str, Value], timing: Mapping[str, Value]) -> None:
        """A step is done."""
        step, now = record.get("step"), self._clock()
        self._step = step if isinstance(step, int) else self._step
        if self._step == self._num_steps or now - self._last_step_at >= STEP_SECONDS:
            self._last_step_at = now
            self._event("info", describe(record, timing))
        self._inner.stepped(record, timing)

    def evaluated(self, record: Mapping[str, Value]) -> None:
        """An evaluation is done."""
        self._event("info", describe_evaluation(record))
        self._inner.evaluated(record)

    def noted(self, text: str) -> None:
        """Something that a person should know."""
        text = redact(text)
        self._event("warning" if "WARNING" in text[:40] else "info", text)
        self._inner.noted(text)

    def finished(self) -> None:
        """The stage is over, or failed."""
        self._inner.finished()
        self._stage, self._step = "", 0

    def _event(self, level: Level, text: str, **details: Detail) -> None:
        where: dict[str, Detail] = {"stage": self._stage, "step": self._step} if self._stage else {}
        self._write(level, text, at=time.time(), details={**where, **details})

    def _write(self, level: Level, text: str, *, at: float, details: dict[str, Detail]) -> None:
        if self._log is None:
            if len(self._waiting) < MAX_WAITING:
                self._waiting.append((level, text, at, details))
            return
        problem = self._log.write(level, text, at=at, details=details)
        if problem:
            self._inner.noted(redact(f"{problem}; the run goes on without it"))
