"""Run the workers of a case side by side on one card, one computing at a time, and collect what they say.

In: commands. Out: what each worker said, or why it ended. Must not know: what is measured.

Every side is a process of its own: one that crashes or runs out of memory is recorded and does not end the rest.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
ALONE_SECONDS = 300.0
"""Longest wait for one line of a worker."""


def environment(*, toy: bool) -> dict[str, str]:
    """The same for every process: no network, allocators as they come."""
    fixed = {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONWARNINGS": "ignore",
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    if toy:
        fixed.setdefault("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "2"))
    return os.environ | fixed


@dataclass
class Worker:
    """A process, its pipe and what came through it. `why` says how it ended where that was not by itself."""

    key: str
    process: subprocess.Popen[str]
    pipe: int
    errors: Path
    said: list[dict[str, Any]] = field(default_factory=list)
    why: str = ""
    ended: bool = False
    started: float = field(default_factory=time.monotonic)
    _rest: bytes = b""

    @property
    def alive(self) -> bool:
        return not self.why

    def go(self) -> None:
        """Let it do its next part."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # its end is found where its next line is read

    def hear(self, until: float) -> dict[str, Any] | None:
        """Its next line; None where it ended, or said nothing until then and was ended."""
        while b"\n" not in self._rest:
            ready, _, _ = select.select([self.pipe], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                self.end("ran out of time")
                return None
            data = os.read(self.pipe, 65_536)
            if not data:
                self.end(self._reason())
                return None
            self._rest += data
        line, self._rest = self._rest.split(b"\n", 1)
        heard: dict[str, Any] = json.loads(line)
        heard["after_seconds"] = time.monotonic() - self.started
        self.said.append(heard)
        return heard

    def hear_event(self, event: str, until: float) -> bool:
        """Read lines up to one of `event`; False where the worker is gone first."""
        while (line := self.hear(until)) is not None:
            if line["event"] == event:
                return True
        return False

    def _reason(self) -> str:
        """The last words of a process that ended, in a line."""
        code = self.process.wait()
        lines = [line for line in self.errors.read_text(errors="replace").splitlines() if line.strip()]
        out_of_memory = [line for line in lines if "OutOfMemoryError" in line or "out of memory" in line]
        last = (out_of_memory or lines or [f"exit code {code}"])[-1]
        return f"out of memory: {last[:300]}" if out_of_memory else last[:300]

    def end(self, why: str) -> None:
        """Stop it, if it has not stopped."""
        self.why = self.why or why
        if self.ended:
            return
        self.ended = True
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        if self.process.stdin is not None:
            self.process.stdin.close()
        os.close(self.pipe)


def start(key: str, command: Sequence[str], *, logs: Path, toy: bool) -> Worker:
    """A worker in a process group of its own; its stdout and stderr go to `logs`."""
    reading, writing = os.pipe()
    errors = logs / f"{key}.err"
    with errors.open("w") as stderr, (logs / f"{key}.out").open("w") as stdout:
        process = subprocess.Popen(
            [sys.executable, *command, "--talk", str(writing), *(["--toy"] if toy else [])],
            cwd=ROOT,
            env=environment(toy=toy),
            stdin=subprocess.PIPE,
            stdout=stdout,
            stderr=stderr,
            text=True,
            pass_fds=(writing,),
            start_new_session=True,
        )
    os.close(writing)
    return Worker(key, process, reading, errors)


def run_together(workers: Sequence[Worker], *, num_rounds: int, deadline: float) -> None:
    """Build all at once, then warm up one after another, then measure in turns: forwards and backwards alternately."""

    def until() -> float:
        return min(deadline, time.monotonic() + ALONE_SECONDS)

    for worker in workers:
        worker.hear_event("built", until())
    for worker in workers:
        if worker.alive:
            worker.go()
            worker.hear_event("ready", until())
    for number in range(num_rounds):
        order = list(workers) if number % 2 == 0 else list(workers)[::-1]
        for worker in order:
            if worker.alive:
                worker.go()
                worker.hear_event("round", until())
    for worker in workers:
        if worker.alive:
            worker.hear_event("done", min(deadline, time.monotonic() + 20))
            worker.end("")


def result_of(worker: Worker) -> dict[str, Any]:
    """What one worker's lines come to."""
    by_event: dict[str, list[dict[str, Any]]] = {}
    for line in worker.said:
        by_event.setdefault(line["event"], []).append(line)
    rounds = by_event.get("round", [])
    last = (rounds or by_event.get("ready", []) or by_event.get("built", []) or [{}])[-1]
    reference = by_event.get("reference", [{}])[0]
    done = by_event.get("done", [{}])[0]
    return {
        "error": "" if rounds and not worker.why else worker.why or "ended early",
        "seconds": [line["seconds"] for line in rounds],
        "steps": rounds[0]["steps"] if rounds else 0,
        "losses": (rounds or by_event.get("ready", [{}]))[-1].get("losses", []),
        "built_gib": by_event.get("built", [{}])[0].get("held_gib"),
        "build_peak_gib": by_event.get("built", [{}])[0].get("build_peak_gib"),
        "peak_gib": last.get("peak_gib"),
        "peak_reserved_gib": last.get("peak_reserved_gib"),
        "steps_peak_gib": max((line.get("own_peak_gib", 0.0) for line in rounds), default=None),
        "reference_seconds": reference.get("seconds", 0.0),
        "reference_pairs": reference.get("pairs", 0),
        "parity": reference.get("parity", ""),
        "backend": reference.get("backend", ""),
        "plan": reference.get("plan", ""),
        "notes": done.get("notes", reference.get("notes", [])),
        "versions": done.get("versions", {}),
        "start_seconds": by_event.get("ready", [{}])[0].get("after_seconds"),
    }


def run_alone(
    key: str, module: str, arguments: Sequence[str], *, logs: Path, seconds: float, toy: bool
) -> dict[str, Any]:
    """A program that prints one line of JSON and needs nobody beside it."""
    command = [sys.executable, "-m", module, *arguments, *(["--toy"] if toy else [])]
    with tempfile.TemporaryFile("w+") as stdout, (logs / f"{key}.err").open("w") as stderr:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(toy=toy), stdout=stdout, stderr=stderr, text=True, start_new_session=True
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = None
        stdout.seek(0)
        lines = [line for line in stdout.read().splitlines() if line.startswith("{")]
    found: dict[str, Any] = json.loads(lines[-1]) if lines else {}
    if code is None:
        found["error"] = "ran out of time"
    elif code:
        last = [line for line in (logs / f"{key}.err").read_text(errors="replace").splitlines() if line.strip()]
        found["error"] = (last or [f"exit code {code}"])[-1][:300]
    return found
