from __future__ import annotations

import os
import signal
from collections.abc import Iterator

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
    results.close()  # type: ignore[attr-defined]


def test_a_closure_needs_no_pickling() -> None:
    offset = 7
    assert list(in_order(lambda number: number + offset, range(3), workers=2)) == [7, 8, 9]


def test_an_error_in_a_worker_is_raised_here() -> None:
    with pytest.raises(ValueError, match="three"):
        list(in_order(fail_at_three, range(9), workers=2))


def test_a_killed_worker_is_a_resource_error() -> None:
    with pytest.raises(ResourceError, match="was killed"):
        list(in_order(kill_at_three, range(9), workers=2))


def test_small_files_stay_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert num_workers(0, PAYS_BYTES - 1) == 1
    assert num_workers(3, 0) == 3
    monkeypatch.setattr("sys.platform", "darwin")
    assert num_workers(3, PAYS_BYTES) == 1
