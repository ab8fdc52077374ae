"""Rounds of a measurement inside a worker: the clock, the memory, and the talk with the driver between rounds.

In: how many steps a round has, and a pipe. Out: one JSON line a round. Must not know: who trains, or what.

A worker waits before its warm-up and before every round until the driver says `go`, so that several workers can hold
their models on one card and still compute one after another. Every round begins with an untimed step: caches that
were given back while others computed are filled again outside the clock.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from dataclasses import dataclass, field
from typing import Any, TextIO

import torch

from benchmarks.workload import peak_rss_gib, rss_gib

GIB = 2**30
WARM_STEPS = 2
"""Steps before the first round: compilation, tuning and allocation happen in them."""


class Finished(Exception):
    """All rounds are measured: leave the training loop."""


def toy_threads() -> int:
    """CPU threads of a toy run."""
    return int(os.environ.get("OMP_NUM_THREADS", "2"))


def synchronize(device: torch.device) -> None:
    """Wait until the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: torch.device) -> None:
    """Forget the peak so far, and give unused memory back."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def memory(device: torch.device) -> dict[str, float]:
    """Peak since the last reset and memory held now, GiB: the allocator's on a card, the resident set on a CPU."""
    if device.type == "cuda":
        return {
            "peak_gib": torch.cuda.max_memory_allocated(device) / GIB,
            "peak_reserved_gib": torch.cuda.max_memory_reserved(device) / GIB,
            "held_gib": torch.cuda.memory_allocated(device) / GIB,
        }
    return {"peak_gib": peak_rss_gib(), "peak_reserved_gib": peak_rss_gib(), "held_gib": rss_gib()}


@dataclass
class Talk:
    """Lines of JSON out, `go` in. Without a pipe nothing waits, and the lines are kept."""

    out: TextIO | None = None
    said: list[dict[str, Any]] = field(default_factory=list)

    def say(self, event: str, **content: object) -> None:
        line = {"event": event, **content}
        self.said.append(line)
        if self.out is not None:
            self.out.write(json.dumps(line) + "\n")
            self.out.flush()

    def wait(self) -> None:
        """Until the driver says go; a driver that is gone ends the worker."""
        if self.out is not None and sys.stdin.readline().strip() != "go":
            raise Finished


@dataclass
class Rounds:
    """Told of every finished step; measures rounds and raises Finished after the last."""

    talk: Talk
    device: torch.device
    timed_steps: int
    num_rounds: int
    step: int = 0
    losses: list[float] = field(default_factory=list)
    _start: float = 0.0
    _highest: dict[str, float] = field(default_factory=dict)

    @property
    def num_steps(self) -> int:
        """Steps in all."""
        return WARM_STEPS + self.num_rounds * (1 + self.timed_steps)

    def begin(self) -> None:
        """Everything is built: wait for leave to warm up. The peak counts from here, weights included."""
        build_peak_gib = memory(self.device)["peak_gib"]
        reset_peak(self.device)
        self.talk.say("built", build_peak_gib=build_peak_gib, **memory(self.device))
        self.talk.wait()

    def lost(self, loss: float) -> None:
        """The loss of the step, where it comes before or after the step's end."""
        self.losses.append(loss)

    def stepped(self) -> None:
        """A step is done."""
        synchronize(self.device)
        now = time.perf_counter()
        self.step += 1
        place = (self.step - WARM_STEPS) % (1 + self.timed_steps)
        if self.step < WARM_STEPS:
            return
        if self.step == WARM_STEPS:
            self._pause("ready")
        elif place == 1:
            self._start = time.perf_counter()
        elif place == 0:
            self._pause("round", seconds=now - self._start, steps=self.timed_steps)
        if self.step == self.num_steps:
            raise Finished

    def _pause(self, event: str, **content: object) -> None:
        """Report, give the memory back, and wait where there is more to do."""
        found = memory(self.device)
        self._highest = {key: max(value, self._highest.get(key, 0.0)) for key, value in found.items()}
        self.talk.say(event, **content, **self._highest, own_peak_gib=found["peak_gib"], losses=list(self.losses))
        if self.step < self.num_steps:
            reset_peak(self.device)
            self.talk.wait()
