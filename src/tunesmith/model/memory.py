"""How much memory a device has, how much of it is free, and the most that this process has held.

In: a device. Out: bytes. Must not know: models, stages.
"""

from __future__ import annotations

import ctypes
import platform
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import psutil
import torch

_GROUP = Path("/sys/fs/cgroup")
_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def usable_bytes(device: torch.device) -> int:
    """What this process may come to hold: what is free now and what it holds already, within its container's limit."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free) + int(torch.cuda.memory_reserved(device))
    held = int(psutil.Process().memory_info().rss)
    usable = int(psutil.virtual_memory().available) + held
    with suppress(OSError, ValueError):  # no such files, or the word `max`
        limit = int((_GROUP / "memory.max").read_text())
        usable = min(usable, limit - int((_GROUP / "memory.current").read_text()) + held)
    return usable


@lru_cache(maxsize=1)
def process_floor() -> int:
    """Resident set of this process when it was first asked for: interpreter and libraries, before a model is there."""
    return int(psutil.Process().memory_info().rss)


def held_bytes(device: torch.device) -> int:
    """Memory that this process holds now."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    return int(psutil.Process().memory_info().rss)


def forget_peak(device: torch.device) -> None:
    """Let the peak start at what is held now; on systems without such a switch it goes on from before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        _CLEAR.write_text("5")


def highest_bytes(device: torch.device) -> int:
    """The most that this process held since `forget_peak`, or since it began."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    with suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return held_bytes(device)


def cap(device: torch.device, limit_bytes: int) -> None:
    """Refuse this process more than `limit_bytes` of a card's memory; a CPU has no such switch."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, max(0, limit_bytes) / total), device)


def give_back_large_blocks(device: torch.device) -> None:
    """Have freed blocks of a mebibyte and more go back to the system at once, where the C library is glibc.

    Else they stay, in gaps that the next tensor may not fit, and a process comes to hold more than is alive; how much
    more depends on the order of sizes. It costs the pages' making anew, so it is for runs whose memory is limited, and
    for quantized bases: those are read whole before they are made small (docs/log.md says what that left behind).
    """
    if device.type == "cuda" or platform.libc_ver()[0] != "glibc":
        return
    ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _LARGE_BLOCK)


_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h
_LARGE_BLOCK = 2**20
