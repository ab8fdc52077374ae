"""Asking a command to stop: by a signal, or by a limit of time.

In: SIGINT, SIGTERM, SIGUSR1 (spot and Slurm notices), and the limits in seconds. Out: one `StopRequest` that the work
looks at wherever it can stop. Must not know: what is saved, torch.

The first signal is a request: the work goes on to its next safe point, which the run chooses. A second one ends it
where it stands. Files are published in one rename, so they are consistent either way.
"""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import FrameType

from tunesmith.errors import StoppedError
from tunesmith.runs.clock import clock, process_start
from tunesmith.runs.watchdog import Watchdog

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
LIMIT = "`save_before`"
TERMINATED = 128 + signal.SIGTERM
GOES_ON = "The same command goes on from there."

REPEAT_SECONDS = 0.3
"""Signals so close together are one request: `timeout`, torchrun and others send theirs to the process and to its
group, and a stop without a save would be their doing."""

_SLACK = 1.25
"""The next step, evaluation and save may take so much longer than the longest of the last ones."""

_EXIT_SECONDS = 1.0
"""Of the limit, kept for ending the process."""

_NUM_RECENT = 8


class StopRequest:
    """Whether the command is to stop, why, and until when. One for a whole command.

    within: seconds from the request to the end of the process. before: seconds after `began` (see `clock`) at which
    the command asks itself to stop; None for no limit.
    """

    def __init__(self, *, within: float = math.inf, before: float | None = None, began: float | None = None) -> None:
        self._within, self._before = within, before
        self._began = clock() if began is None else began
        self._number, self._reason, self._deadline = 0, "", math.inf
        self._received: float | None = None
        self._took: dict[str, list[float]] = {}
        self._expected: dict[str, float] = {}
        self._required: list[Callable[[], None]] = []

    @property
    def number(self) -> int:
        """Signal that the process is to exit by (128 + number); 0 while nothing asks it to stop."""
        if not self._number and self.limit_seconds() <= 0:
            self._ask(signal.SIGTERM, LIMIT)
        return self._number

    @property
    def reason(self) -> str:
        """What asked: the signal's name, or `save_before`."""
        return self._reason

    @property
    def deadline(self) -> float:
        """When the process must have ended, by `clock`; infinite while nothing asks it to stop."""
        return self._deadline

    def limit_seconds(self) -> float:
        """Seconds until the time limit; infinite where there is none."""
        return math.inf if self._before is None else self._began + self._before - clock()

    def note(self, number: int) -> None:
        """A signal came; only the first counts. Safe to call from any thread."""
        if not self._number:
            self._ask(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM, signal.Signals(number).name)

    def receive(self, number: int, frame: FrameType | None) -> None:
        """The handler: the first signal is noted; a later one ends the work where it stands, without a save."""
        now = clock()
        if self._received is None:
            self._received = now
            self.note(number)
        elif now - self._received > REPEAT_SECONDS:
            raise StoppedError(
                f"a second signal ({signal.Signals(number).name}) stopped it at once, without a save.",
                signal_number=self._number,
                remedy="What was saved before stands. " + GOES_ON,
            )

    def took(self, kind: str, seconds: float) -> None:
        """A piece of work (a step, an evaluation, a save) took so long; the time limit is kept by it."""
        recent = self._took.setdefault(kind, [])
        recent.append(seconds)
        del recent[:-_NUM_RECENT]

    def expect(self, kind: str, seconds: float) -> None:
        """A guess for a kind of work, until one was measured."""
        self._expected[kind] = seconds

    def longest(self, kind: str) -> float:
        """Seconds of the longest of the last few pieces of a kind; where there was none, what is expected."""
        return max(self._took.get(kind, ()), default=self._expected.get(kind, 0.0))

    def require(self, check: Callable[[], None]) -> None:
        """Call `check` at every safe point, too: it raises where the command may not go on."""
        self._required.append(check)

    def is_due(self, *kinds: str) -> bool:
        """Whether to stop now: asked to, or the limit would pass while one more piece of each kind is done."""
        self._check()
        needed = _EXIT_SECONDS + _SLACK * sum(self.longest(kind) for kind in kinds)
        if not self.number and self.limit_seconds() < needed:
            self._ask(signal.SIGTERM, LIMIT)
        return self.number != 0

    def begin(self, kind: str) -> float:
        """When a piece of work that begins now should be done, by `clock`."""
        return clock() + self.longest(kind)

    def fits(self, done_at: float, *kinds: str) -> bool:
        """Whether work that should be done at `done_at`, and one piece of each kind behind it, end in time."""
        now = clock()
        needed = max(0.0, done_at - now) + sum(self.longest(kind) for kind in kinds)
        return now + _SLACK * needed + _EXIT_SECONDS <= self._deadline

    def raise_if_requested(self, where: str = "", kept: str = "what was done so far is kept") -> None:
        """A safe point outside of the training loop. Raises StoppedError (143, 130) where a stop was asked for."""
        self._check()
        if not self.number:
            return
        more_time = " Give `save_before` more time: it passed before the first step." if self._is_too_short() else ""
        what = f"stopped by {self.reason}; {kept}."
        raise StoppedError(what, signal_number=self.number, where=where, remedy=GOES_ON + more_time)

    def _check(self) -> None:
        for check in self._required:
            check()

    def _is_too_short(self) -> bool:
        return self._reason == LIMIT and "step" not in self._took

    def _ask(self, number: int, reason: str) -> None:
        before_limit = max(0.0, self.limit_seconds()) if reason == LIMIT else 0.0  # the save has this time, too
        self._reason, self._deadline = reason, clock() + before_limit + self._within
        self._number = int(number)  # last: whoever sees it sees the others


@contextmanager
def stop_requests(
    *, within: float = math.inf, before: float | None = None, owns_process: bool = False
) -> Iterator[StopRequest]:
    """Catch the signals inside; only the main thread may, so elsewhere (some notebooks) none is caught.

    owns_process: the process is the command's own. Then the time limit counts from its start, and where a safe point
    does not come within `within` seconds a watchdog ends the process; a notebook or script of others is never ended.
    """
    request = StopRequest(within=within, before=before, began=process_start() if owns_process else None)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    with Watchdog(request, SIGNALS, repeat_seconds=REPEAT_SECONDS) if owns_process else nullcontext(), caught(request):
        yield request


@contextmanager
def caught(request: StopRequest) -> Iterator[None]:
    """The signals reach the request inside; again inside itself it changes nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with ExitStack() as undo:
        for number in SIGNALS:
            undo.callback(signal.signal, number, signal.signal(number, request.receive))
        yield


class Terminated(SystemExit):
    """SIGTERM or SIGUSR1 in a command that has nothing to save. No `Exception`, so that no library swallows it."""


@contextmanager
def ends_at_once() -> Iterator[None]:
    """SIGTERM and SIGUSR1 raise Terminated inside, with exit code 143, so that what is open is closed and removed.

    SIGINT stays Python's KeyboardInterrupt.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with ExitStack() as undo:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            undo.callback(signal.signal, number, signal.signal(number, _terminate))
        yield


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated(TERMINATED)
