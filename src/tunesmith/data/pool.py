"""Work on many chunks, in order, in this process or in several.

In: tasks and a pure function. Out: results in the order of the tasks. Must not know: rows, tokenizers.

Processes are forked, so that they have the tokenizer and template at once and a script needs no `__main__` guard;
that is safe on Linux, and before any process group or GPU context exists. Elsewhere the work stays in one process.
"""

from __future__ import annotations

import gc
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
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


def in_order(function: Callable[[T], R], tasks: Iterable[T], *, workers: int) -> Iterator[R]:
    """`function` of every task, in order; at most two tasks a worker wait at a time, so memory stays bounded.

    Raises ResourceError where a worker is killed (usually for memory).
    """
    if workers <= 1:
        yield from map(function, tasks)
        return
    pool = ProcessPoolExecutor(workers, get_context("fork"), initializer=_adopt, initargs=(function,))
    try:
        yield from _results(pool, tasks, at_once=2 * workers)
    except BrokenProcessPool as error:
        raise ResourceError(
            "a process that prepares rows was killed, most likely because memory ran out",
            where=f"{workers} data workers",
            remedy="Set `data_workers: 1` in the recipe, or free memory.",
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _results(pool: ProcessPoolExecutor, tasks: Iterable[object], *, at_once: int) -> Iterator[R]:
    waiting: deque[Future[R]] = deque()
    for task in tasks:
        waiting.append(cast("Future[R]", pool.submit(_call, task)))
        if len(waiting) >= at_once:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _adopt(function: Callable[[Any], object]) -> None:
    """In the worker: keep the function; the tokenizer's own threads would outnumber the cores."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    gc.freeze()  # what was there before lives as long as the process: the collector need not look at it
    gc.disable()
    _shared.append(function)


def _call(task: object) -> object:
    result = _shared[-1](task)
    _tasks_done.append(None)
    if len(_tasks_done) >= COLLECT_EVERY:  # in the midst of a chunk it would cost a tenth of the time
        _tasks_done.clear()
        gc.collect()
    return result
