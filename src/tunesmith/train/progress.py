"""What a person sees while a stage runs: one live line in a terminal, a few plain lines elsewhere.

In: the loop's records. Out: text. Must not know: models, files, what a metric means.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from tunesmith.runs.records import Value

GIB = 2**30
_RECENT_STEPS = 20
"""Steps whose median duration gives the time left: a pause (a sleeping laptop, SIGSTOP) is one of them."""

_PLAIN_LINES = 20
"""Lines that a stage prints where there is no terminal, beside its evaluations."""


class Observer(Protocol):
    """Told by the loop what happens; main rank only."""

    def started(self, stage: str, *, first_step: int, num_steps: int) -> None:
        """A stage begins after `first_step` (0: from its start)."""

    def stepped(self, record: Mapping[str, Value], timing: Mapping[str, Value]) -> None:
        """A step is done; the records are those of metrics.jsonl and timings.jsonl."""

    def evaluated(self, record: Mapping[str, Value]) -> None:
        """An evaluation is done; the record is that of eval.jsonl."""

    def noted(self, text: str) -> None:
        """Something that a person should know."""

    def finished(self) -> None:
        """The stage is over, or failed."""


class Silent:
    """Says nothing."""

    def started(self, stage: str, *, first_step: int, num_steps: int) -> None:
        """Nothing."""

    def stepped(self, record: Mapping[str, Value], timing: Mapping[str, Value]) -> None:
        """Nothing."""

    def evaluated(self, record: Mapping[str, Value]) -> None:
        """Nothing."""

    def noted(self, text: str) -> None:
        """Nothing."""

    def finished(self) -> None:
        """Nothing."""


class Eta:
    """Seconds left, from a clock that never goes back."""

    def __init__(self, num_steps: int) -> None:
        self._num_steps = num_steps
        self._recent: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._last = time.monotonic()

    def seconds_left(self, step: int) -> float:
        """Call once a step. The median of the recent steps, times those that are left."""
        now = time.monotonic()
        self._recent.append(now - self._last)
        self._last = now
        return statistics.median(self._recent) * (self._num_steps - step)


class PlainLines:
    """Few lines, each whole: for logs, notebooks and pipes."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._stage, self._num_steps, self._every = "", 0, 1
        self._eta = Eta(0)

    def started(self, stage: str, *, first_step: int, num_steps: int) -> None:
        """One line."""
        self._stage, self._num_steps, self._every = stage, num_steps, max(1, num_steps // _PLAIN_LINES)
        self._eta = Eta(num_steps)
        again = f", going on after step {first_step}" if first_step else ""
        self._print(f"{num_steps} steps{again}")

    def stepped(self, record: Mapping[str, Value], timing: Mapping[str, Value]) -> None:
        """A line every so many steps, and for the first and the last."""
        step = _number(record, "step")
        left = self._eta.seconds_left(int(step))
        if step == 1 or step % self._every == 0 or step == self._num_steps:
            self._print(f"step {step:.0f}/{self._num_steps}  {describe(record, timing)}  {clock(left)} left")

    def evaluated(self, record: Mapping[str, Value]) -> None:
        """One line."""
        self._print(describe_evaluation(record))

    def noted(self, text: str) -> None:
        """One line."""
        self._print(text)

    def finished(self) -> None:
        """What follows is no longer this stage's."""
        self._stage = ""

    def _print(self, text: str) -> None:
        with suppress(OSError, ValueError):  # a terminal or pipe that is gone stops no run; the log has the line
            print(f"[{self._stage}] {text}" if self._stage else text, file=self._stream, flush=True)


class LiveLine:
    """A progress bar with the latest figures; evaluations and notes scroll by above it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress: Progress | None = None
        self._stage = ""
        self._eta = Eta(0)

    def started(self, stage: str, *, first_step: int, num_steps: int) -> None:
        """Opens the bar."""
        self.finished()
        self._stage, self._eta = stage, Eta(num_steps)
        texts = (TextColumn("{task.description}"), TextColumn("{task.fields[text]}"))
        columns = (texts[0], BarColumn(20), MofNCompleteColumn(), texts[1])
        self._progress = Progress(*columns, console=self._console, refresh_per_second=4)
        self._progress.add_task(stage, total=num_steps, completed=first_step, text="")
        self._progress.start()

    def stepped(self, record: Mapping[str, Value], timing: Mapping[str, Value]) -> None:
        """Moves the bar."""
        step = int(_number(record, "step"))
        left = self._eta.seconds_left(step)
        if self._progress is not None:
            text = f"{describe(record, timing)}  {clock(left)} left"
            self._progress.update(self._progress.task_ids[0], completed=step, text=text)

    def evaluated(self, record: Mapping[str, Value]) -> None:
        """One line above the bar."""
        self.noted(describe_evaluation(record))

    def noted(self, text: str) -> None:
        """One line above the bar."""
        with suppress(OSError, ValueError):
            self._console.print(f"[{self._stage}] {text}" if self._stage else text, markup=False, highlight=False)

    def finished(self) -> None:
        """Closes the bar."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        self._stage = ""


def observer_for(stream: TextIO | None = None) -> Observer:
    """A live line where `stream` (standard error by default) is a terminal, plain lines elsewhere."""
    stream = stream or sys.stderr
    console = Console(file=stream)
    return LiveLine(console) if console.is_terminal and not console.is_dumb_terminal else PlainLines(stream)


def describe(record: Mapping[str, Value], timing: Mapping[str, Value]) -> str:
    """The figures of one step in one line."""
    parts = [f"loss {_number(record, 'loss'):.4f}"]
    if "accuracy" in record:
        parts.append(f"accuracy {_number(record, 'accuracy'):.2f}")
    if math.isfinite(_number(record, "margin")):  # a step of one label has none
        parts.append(f"margin {_number(record, 'margin'):.3f}")
    parts.append("skipped" if record.get("skipped") else f"lr {_number(record, 'lr'):.2e}")
    parts.append(f"{_number(timing, 'tokens_per_second'):,.0f} tokens/s")
    parts.append(f"{_number(timing, 'examples_per_second'):,.1f} examples/s")
    parts.append(f"{_number(timing, 'memory_bytes') / GIB:.2f} GiB")
    return "  ".join(parts)


def describe_evaluation(record: Mapping[str, Value]) -> str:
    """The figures of one evaluation in one line."""
    accuracy = f", accuracy {_number(record, 'accuracy'):.3f}" if "accuracy" in record else ""
    examples = f"{_number(record, 'num_examples'):.0f} held-out examples"
    return f"step {_number(record, 'step'):.0f}: held-out loss {_number(record, 'loss'):.4f}{accuracy} ({examples})"


def clock(seconds: float) -> str:
    """1:02:03 or 2:03; never negative."""
    minutes, second = divmod(max(0, round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def _number(record: Mapping[str, Value], name: str) -> float:
    value = record.get(name)
    return float(value) if isinstance(value, int | float) else float("nan")
