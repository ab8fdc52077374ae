"""The end of a process that does not come to its end: a thread that keeps the deadline of a stop.

In: what knows whether a stop was asked for, and until when. Out: an ended process, with the code of the signal.
Must not know: what the process does.

Python runs a signal's handler between two bytecodes of the main thread, so never while that thread is inside a long
kernel or a hung driver. The interpreter's wakeup file descriptor hears a signal at once, and this thread reads it.
Code that holds the interpreter's lock all the while stops this thread too; then only SIGKILL helps, which is as safe.
"""

from __future__ import annotations

import math
import os
import select
import signal
import socket
import threading
from collections.abc import Collection
from types import TracebackType
from typing import Protocol

from tunesmith.runs.clock import clock

AT_ONCE_SECONDS = 3.0
"""From a second signal to the end, where unwinding (closing, removing temporary files) takes longer."""

_LOOK_SECONDS = 20.0
"""Longest wait between two looks at the clock: the system's timers stand still while a machine sleeps."""

_CLOSE = 0  # no signal has this number
_STDERR = 2


class Stop(Protocol):
    """What the watchdog asks and tells; `runs.stop.StopRequest` is one."""

    @property
    def number(self) -> int:
        """Signal that the process is to exit by, 0 while nothing asks it to stop."""

    @property
    def reason(self) -> str:
        """What asked."""

    @property
    def deadline(self) -> float:
        """When the process must have ended, by `clock`."""

    def limit_seconds(self) -> float:
        """Seconds until the time limit."""

    def note(self, number: int) -> None:
        """A signal came."""


class Watchdog:
    """A context; the thread lives as long as it. For the main thread of a process that is the command's own."""

    def __init__(self, stop: Stop, signals: Collection[int], *, repeat_seconds: float) -> None:
        self._stop, self._signals, self._repeat_seconds = stop, signals, repeat_seconds
        self._first = self._end = math.inf
        self._has_said = False

    def __enter__(self) -> None:
        self._receiver, self._sender = socket.socketpair()
        self._sender.setblocking(False)
        self._before = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, name="tunesmith-watchdog", daemon=True)
        self._thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(self._before)
        self._sender.send(bytes([_CLOSE]))
        self._thread.join()
        self._receiver.close()
        self._sender.close()

    def _watch(self) -> None:
        while True:
            left = min(self._stop.deadline, self._end) - clock()
            limit = math.inf if self._has_said else self._stop.limit_seconds()
            wait = max(0.0, min(left, limit, _LOOK_SECONDS))
            if select.select([self._receiver], [], [], wait)[0]:
                numbers = self._receiver.recv(64)
                if _CLOSE in numbers:
                    return
                for number in numbers:
                    self._hear(number)
            self._look()

    def _hear(self, number: int) -> None:
        if number not in self._signals:
            return
        now = clock()
        if self._first == math.inf:
            self._first = now
            self._stop.note(number)
        elif now - self._first > self._repeat_seconds:
            self._end = min(self._end, now + AT_ONCE_SECONDS)

    def _look(self) -> None:
        number = self._stop.number
        if number and not self._has_said:
            self._has_said = True
            left = self._stop.deadline - clock()
            _say(f"{self._stop.reason}: stopping at the next safe point, within {left:.0f} s; again: at once")
        if number and clock() >= min(self._stop.deadline, self._end):
            _say(f"{self._stop.reason}: out of time, so the process ends where it is; what was saved before stands")
            os._exit(128 + number)


def _say(text: str) -> None:
    """One line on standard error, without its locks; nothing where it would not be taken at once, as by a full pipe."""
    is_terminal = os.isatty(_STDERR)
    show_cursor = "\r\033[K\033[?25h" if is_terminal else ""  # a live line may have hidden it
    try:
        if select.select([], [_STDERR], [], 0)[1]:
            os.write(_STDERR, f"{show_cursor}{text}\n".encode())
    except (OSError, ValueError):
        return
