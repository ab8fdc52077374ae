"""Time that nobody sets.

In: nothing. Out: seconds that never go back, and when a process began by them. Must not know: dates, what is timed.

A date is only ever shown to people; what is measured, ordered or waited for goes by this clock or by step numbers.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

PROC = Path("/proc")

_COUNTS_SLEEP = time.CLOCK_MONOTONIC if sys.platform == "darwin" else time.CLOCK_BOOTTIME
"""On macOS the first counts sleep (`time.monotonic` does not), on Linux only the second does."""


def clock() -> float:
    """Seconds from a clock that counts the machine's sleep too; its zero means nothing."""
    return time.clock_gettime(_COUNTS_SLEEP)


def start_ticks(pid: int) -> int | None:
    """When a process began, in the system's ticks since it started; None where there is none, or no way to know.

    A number and a start name a process for good; the number alone is given out again.
    """
    try:
        after_name = (PROC / str(pid) / "stat").read_text("utf-8", errors="replace").rpartition(")")[2].split()
        return int(after_name[19])  # the 22nd field of all
    except (OSError, ValueError, IndexError):
        return None


def process_start() -> float:
    """When this process began, by `clock`; now, where the system does not say."""
    ticks = start_ticks(os.getpid())
    return clock() if ticks is None else min(clock(), ticks / os.sysconf("SC_CLK_TCK"))


def boot_id() -> str:
    """Names the time since the machine started; empty where it does not say."""
    try:
        return (PROC / "sys/kernel/random/boot_id").read_text("utf-8").strip()
    except OSError:
        return ""
