"""Limits on what a chat template may take: it is a program that came with a model.

In: work to do, or text that came out. Out: the same, or the reason why it was stopped: too long, too large.
Must not know: templates, tokenizers, rows.

Templates run in the sandbox of transformers, which keeps them from Python's internals but lets them count to
10**10. So a template is first tried in a forked child, with limits on time and memory, that is killed if need be;
after that every render has a limit on processor time, and its text a limit on length.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType

RENDER_SECONDS = 1.2  # of processor time for one render; ordinary ones take a ten-thousandth of it
TICK_SECONDS = 0.1  # how often the time is looked at
AT_NEXT_TICK = -1.0  # no time that a clock gives
TRIAL_SECONDS = 1.2  # of processor time for a trial in a child: a machine under load refuses nothing that is honest
WAIT_SECONDS = 30.0  # of wall time for the same, in case the child should not run at all
TRIAL_BYTES = 1 << 29  # memory that a trial may take on top of what the process has
MAX_RATIO = 16  # longest text, in multiples of the conversation: JSON inside JSON doubles every quote
MAX_EXTRA = 200_000  # characters that a template may write by itself: the longest system prompts have 20,000


class OverLimit(Exception):
    """A template took too long or too much; the message says which."""


def check_length(text: str, size: int) -> str:
    """The text. Raises OverLimit where a template made it out of all proportion to a conversation of `size`."""
    limit = MAX_RATIO * size + MAX_EXTRA
    if len(text) > limit:
        raise OverLimit(f"it wrote {len(text):,} characters for a conversation of {size:,}; the limit is {limit:,}")
    return text


class Watch:
    """Stops a render that takes too long, in the main thread of a process; elsewhere it only lets it run.

    The timer counts the processor time of the process, so a busy machine stops nothing, and it is not the
    timer that test runners use.
    """

    def __init__(self) -> None:
        self._since: float | None = None
        self._active = False
        self._before: Callable[[int, FrameType | None], object] | int | None = None

    def __enter__(self) -> Watch:
        if sys.platform != "win32" and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGVTALRM, self._look)
            signal.setitimer(signal.ITIMER_VIRTUAL, TICK_SECONDS, TICK_SECONDS)
            self._active = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._since = None
        if sys.platform != "win32" and self._active:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, self._before)
            self._active = False

    def start(self) -> None:
        """A render begins: its time counts from the next tick, for asking the clock costs more than many renders."""
        self._since = AT_NEXT_TICK

    def stop(self) -> None:
        """No render is under way."""
        self._since = None

    def _look(self, signum: int, frame: FrameType | None) -> None:
        if self._since is None:
            return
        if self._since == AT_NEXT_TICK:
            self._since = time.thread_time()
        if time.thread_time() - self._since > RENDER_SECONDS:
            self._since = None
            raise OverLimit(f"it ran for more than {RENDER_SECONDS} seconds")


def try_in_child(work: Callable[[], str]) -> str:
    """Runs `work` in a child with limits: what it returns, or why it was stopped. Other systems than Linux: "".

    The child shares nothing that it could harm: it is a copy, and ends without cleaning up.
    """
    if sys.platform != "linux":
        return ""
    read_end, write_end = os.pipe()
    with warnings.catch_warnings():  # the child runs no thread's work: it renders and ends
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        _child(work, write_end)
    os.close(write_end)
    answer = ""
    try:
        if select.select([read_end], [], [], WAIT_SECONDS)[0]:
            answer = os.read(read_end, 4096).decode(errors="replace")
        else:
            os.kill(pid, signal.SIGKILL)
    finally:
        os.close(read_end)
        _, status = os.waitpid(pid, 0)
    if answer.startswith("done "):
        return answer.removeprefix("done ")
    out_of_time = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGPROF, signal.SIGKILL)
    return f"it ran for more than {TRIAL_SECONDS} seconds" if out_of_time else "it brought its process down"


def _child(work: Callable[[], str], write_end: int) -> None:
    """The child's whole life. Never returns."""
    try:
        import resource

        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = used + TRIAL_BYTES if hard == resource.RLIM_INFINITY else min(hard, used + TRIAL_BYTES)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
        signal.signal(signal.SIGPROF, signal.SIG_DFL)  # which ends the process, whatever it is in the middle of
        signal.setitimer(signal.ITIMER_PROF, TRIAL_SECONDS)
        found = work()
    except MemoryError:
        found = f"it takes more than {TRIAL_BYTES >> 20} MiB of memory"
    except BaseException as error:  # whatever it is, the parent is told, and this copy ends here
        found = f"{type(error).__name__}: {error}"
    try:
        os.write(write_end, f"done {found}"[:2000].encode(errors="replace"))
    finally:
        os._exit(0)
