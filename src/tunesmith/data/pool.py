"""Work on many chunks, in order, in this process or in several.

In: tasks and a pure function. Out: results in the order of the tasks. Must not know: rows, tokenizers.

Processes are forked, so that they have the tokenizer and template at once and a script needs no `__main__` guard;
that is safe on Linux, and before any process group or GPU context exists. Elsewhere the work stays in one process.
A worker leaves signals to the process that it works for, and ends when that one is gone, however it went.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import active_children, get_context
from multiprocessing.process import BaseProcess
from threading import Thread
from typing import Any, TypeVar, cast

from tunesmith.errors import ResourceError

T = TypeVar("T")
R = TypeVar("R")
PAYS_BYTES = 4 * 2**20
"""Starting processes costs about a tenth of a second, which is what this much data takes."""
MAX_AUTO = 16  # more than this waits for the one process that reads and writes
COLLECT_EVERY = 8  # chunks between two collections of cyclic garbage in a worker
_tasks_done: list[None] = []
_shared: list[Callable[[Any], object]] = []


def num_workers(asked: int, num_bytes: int) -> int:
    """Processes to use: as asked, or (0) one a core where there is enough data for it to pay; 1 is this process."""
    if sys.platform != "linux":
        return 1
    if asked:
        return asked
    return min(len(os.sched_getaffinity(0)), MAX_AUTO) if num_bytes >= PAYS_BYTES else 1


def in_order(
    function: Callable[[T], R],
    tasks: Iterable[T],
    *,
    workers: int,
    where: str = "",
    between: Callable[[], None] = lambda: None,
) -> Generator[R]:
    """`function` of every task, in order; at most two tasks a worker wait at a time, so memory stays bounded.

    Raises ResourceError, with `where`, where a worker is killed (usually for memory); `between` is called first: a
    signal to the whole group kills workers too, and what it raises says so.
    """
    if workers <= 1:
        yield from map(function, tasks)
        return
    others = set(active_children())
    read_end, write_end = os.pipe()  # the end for writing is open in this process alone: it closes as this one dies
    pool = ProcessPoolExecutor(
        workers, get_context("fork"), initializer=_adopt, initargs=(function, read_end, write_end)
    )
    processes: list[BaseProcess] = []
    try:
        waiting: deque[Future[R]] = deque()
        left = iter(tasks)
        for task in islice(left, 1):  # starts all processes
            waiting.append(cast("Future[R]", pool.submit(_call, task)))
        processes += [process for process in active_children() if process not in others]
        yield from _results(pool, left, waiting, at_once=2 * workers)
    except BrokenProcessPool as error:
        pool.shutdown()
        between()
        raise _killed(processes, where or f"{workers} data workers") from error
    finally:
        pool.shutdown(cancel_futures=True)
        os.close(write_end)
        os.close(read_end)


def _results(
    pool: ProcessPoolExecutor, tasks: Iterable[object], waiting: deque[Future[R]], *, at_once: int
) -> Iterator[R]:
    for task in tasks:
        waiting.append(cast("Future[R]", pool.submit(_call, task)))
        if len(waiting) >= at_once:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _killed(processes: list[BaseProcess], where: str) -> ResourceError:
    """Which worker was killed, and by what. The pool ends the others with SIGTERM, so those are named last."""
    codes = {process.pid: process.exitcode for process in processes if process.exitcode}
    first = {pid: code for pid, code in codes.items() if code != -signal.SIGTERM} or codes
    named = ", ".join(f"{pid} ({_cause(code)})" for pid, code in first.items() if code) or "of unknown number"
    return ResourceError(
        f"a process that prepares rows was killed, most likely because memory ran out: process {named}",
        where=where,
        remedy="Set `data_workers: 1` in the recipe, or free memory; the same command goes on where it stopped.",
    )


def _cause(code: int) -> str:
    if code > 0:
        return f"exit code {code}"
    return signal.Signals(-code).name if -code in signal.valid_signals() and -code < signal.SIGRTMIN else str(code)


def _adopt(function: Callable[[Any], object], read_end: int, write_end: int) -> None:
    """In the worker: keep the function; the tokenizer's own threads would outnumber the cores."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the parent's to answer
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not the parent's handler: the pool ends its workers with it
    os.close(write_end)
    Thread(target=_end_with_parent, args=(read_end,), daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    gc.freeze()  # what was there before lives as long as the process: the collector need not look at it
    gc.disable()
    _shared.append(function)


def _end_with_parent(read_end: int) -> None:
    """Without this a worker of a killed process would wait for its next task for ever."""
    os.read(read_end, 1)  # returns only when nobody can write any more
    os._exit(1)


def _call(task: object) -> object:
    result = _shared[-1](task)
    _tasks_done.append(None)
    if len(_tasks_done) >= COLLECT_EVERY:  # in the midst of a chunk it would cost a tenth of the time
        _tasks_done.clear()
        gc.collect()
    return result
