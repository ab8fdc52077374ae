from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

from tunesmith.data.pool import PAYS_BYTES, in_order, num_workers
from tunesmith.errors import ResourceError


def triple(number: int) -> tuple[int, int]:
    return 3 * number, os.getpid()


def kill_at_three(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def fail_at_three(number: int) -> int:
    if number == 3:
        raise ValueError("three")
    return number


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_the_order_of_the_tasks(workers: int) -> None:
    results = list(in_order(triple, range(20), workers=workers))
    assert [value for value, _ in results] == [3 * number for number in range(20)]
    assert (os.getpid() in {pid for _, pid in results}) == (workers == 1)


def test_tasks_are_drawn_as_they_are_needed() -> None:
    drawn = []

    def tasks() -> Iterator[int]:
        for number in range(100):
            drawn.append(number)
            yield number

    results = in_order(triple, tasks(), workers=2)
    next(results)
    assert len(drawn) <= 5
    results.close()


def test_a_closure_needs_no_pickling() -> None:
    offset = 7
    assert list(in_order(lambda number: number + offset, range(3), workers=2)) == [7, 8, 9]


def test_an_error_in_a_worker_is_raised_here() -> None:
    with pytest.raises(ValueError, match="three"):
        list(in_order(fail_at_three, range(9), workers=2))


def test_a_killed_worker_is_a_resource_error() -> None:
    with pytest.raises(ResourceError, match=r"was killed.*process \d+ \(SIGKILL\)") as caught:
        list(in_order(kill_at_three, range(9), workers=2, where="a.jsonl"))
    assert caught.value.where == "a.jsonl"


def test_a_worker_ends_with_the_process_that_it_works_for(tmp_path: Path) -> None:
    """Killed, that process can tell nobody: its workers would wait for their next task for ever."""
    pid = os.fork()
    if not pid:
        results = in_order(triple, range(20), workers=2)  # kept: closed, it would end its workers itself
        found = {worker for _, worker in islice(results, 9)}
        (tmp_path / "pids").write_text(" ".join(map(str, found)))
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    pids = [int(worker) for worker in (tmp_path / "pids").read_text().split()]
    assert pids
    end = time.monotonic() + 5
    while any(map(is_alive, pids)) and time.monotonic() < end:
        time.sleep(0.01)
    assert not any(map(is_alive, pids))


def is_alive(pid: int) -> bool:
    """A process that ended and that nobody has asked about is a zombie, which runs no more."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def signals_of(number: int) -> list[object]:
    return [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]


def test_workers_leave_signals_to_their_parent() -> None:
    """With its handlers they would not end when the pool ends them; with Python's they would print tracebacks."""
    before = signal.signal(signal.SIGTERM, lambda *args: None)
    try:
        found = list(in_order(signals_of, range(3), workers=2))
        with pytest.raises(ResourceError):
            list(in_order(kill_at_three, range(9), workers=2))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert found == 3 * [[signal.SIG_IGN, signal.SIG_DFL, signal.SIG_IGN]]


def test_what_is_raised_between_comes_before_the_killed_worker() -> None:
    def stop() -> None:
        raise InterruptedError("stopped")

    with pytest.raises(InterruptedError, match="stopped"):
        list(in_order(kill_at_three, range(9), workers=2, between=stop))


def test_small_files_stay_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert num_workers(0, PAYS_BYTES - 1) == 1
    assert num_workers(3, 0) == 3
    monkeypatch.setattr("sys.platform", "darwin")
    assert num_workers(3, PAYS_BYTES) == 1
