"""Signals that ask a run to stop.

In: SIGINT (Ctrl-C) and SIGTERM. Out: a flag that the loop reads between steps. Must not know: what is saved.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from tunesmith.errors import StoppedError

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass
class StopRequest:
    """`number` of the signal that came, 0 while none has."""

    number: int = 0

    def receive(self, number: int, frame: FrameType | None) -> None:
        """The first signal is noted; the second ends the run where it stands, without a save."""
        if self.number:
            raise StoppedError("stopped at once, without a save.", signal_number=number)
        self.number = number


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Catch the signals inside; only the main thread may, so elsewhere (some notebooks) none is caught."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = [(number, signal.signal(number, request.receive)) for number in SIGNALS]
    try:
        yield request
    finally:
        for number, handler in before:
            signal.signal(number, handler)
