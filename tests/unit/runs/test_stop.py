from __future__ import annotations

import math
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from tunesmith.errors import LockedError, StoppedError
from tunesmith.runs import clock as clocks
from tunesmith.runs import stop as stops
from tunesmith.runs.stop import REPEAT_SECONDS, StopRequest, Terminated, ends_at_once, stop_requests


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds = 1000.0
        monkeypatch.setattr(stops, "clock", lambda: self.seconds)


@pytest.mark.parametrize(
    ("number", "name", "code"), [(signal.SIGTERM, "SIGTERM", 143), (signal.SIGINT, "SIGINT", 130), (10, "SIGUSR1", 143)]
)
def test_the_first_signal_is_noted(number: int, name: str, code: int) -> None:
    with stop_requests(within=30) as stop:
        assert stop.number == 0
        stop.raise_if_requested()
        os.kill(os.getpid(), number)
        with pytest.raises(StoppedError, match=f"stage dpo: stopped by {name}; rows are kept") as caught:
            stop.raise_if_requested("stage dpo", "rows are kept")
    assert 128 + caught.value.signal_number == code
    assert caught.value.remedy == "The same command goes on from there."


def test_handlers_are_given_back() -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    wakeup = signal.set_wakeup_fd(-1)
    with stop_requests(owns_process=True):
        assert [signal.getsignal(number) for number in numbers] != before
    assert [signal.getsignal(number) for number in numbers] == before
    assert signal.set_wakeup_fd(-1) == wakeup == -1
    assert not [thread for thread in threading.enumerate() if thread.name == "tunesmith-watchdog"]


def test_a_repetition_is_one_request_and_a_second_signal_stops_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    stop = StopRequest()
    stop.receive(signal.SIGTERM, None)
    clock.seconds += REPEAT_SECONDS - 0.01  # as `timeout` sends it: to the process and to its group
    stop.receive(signal.SIGTERM, None)
    clock.seconds += 0.02
    with pytest.raises(StoppedError, match="second signal \\(SIGINT\\) stopped it at once") as caught:
        stop.receive(signal.SIGINT, None)
    assert caught.value.signal_number == signal.SIGTERM


def test_the_deadline_counts_from_the_first_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    stop = StopRequest(within=30)
    assert stop.deadline == math.inf
    stop.note(signal.SIGTERM)
    clock.seconds += 5
    stop.note(signal.SIGINT)
    assert (stop.deadline, stop.reason) == (1030.0, "SIGTERM")


def test_work_fits_before_the_deadline_with_a_quarter_to_spare(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    stop = StopRequest(within=30)
    stop.took("step", 12.0)
    stop.took("save", 8.0)
    done_at = stop.begin("step")
    assert done_at == 1012.0
    stop.note(signal.SIGTERM)  # until 1030
    assert stop.fits(done_at, "save")  # 1.25 * (12 + 8) + 1 = 26 <= 30
    stop.took("save", 12.0)
    assert not stop.fits(done_at, "save")  # 1.25 * (12 + 12) + 1 = 31
    clock.seconds = 1011.0
    assert stop.fits(done_at, "save")  # 1011 + 1.25 * (1 + 12) + 1 = 1028.25
    clock.seconds = 1016.0  # the step takes longer than the last ones: what is left of it is unknown, the save is not
    assert not stop.fits(done_at, "save")  # 1016 + 1.25 * 12 + 1 = 1032


def test_the_time_limit_leaves_room_for_one_more_step_and_its_save(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    stop = StopRequest(within=30, before=100, began=990.0)  # ten seconds went before: it ends at 1090
    stop.expect("save", 20.0)
    stop.took("step", 8.0)
    clock.seconds = 1053.0
    assert not stop.is_due("step", "save")  # 1.25 * (8 + 20) + 1 = 36 of 37
    clock.seconds = 1055.0
    assert stop.number == 0
    assert stop.is_due("step", "save")
    assert (stop.number, stop.reason, stop.deadline) == (signal.SIGTERM, "`save_before`", 1120.0)  # the limit and 30 s


def test_a_save_that_was_measured_replaces_the_guess_and_the_longest_of_the_last_counts() -> None:
    stop = StopRequest()
    stop.expect("save", 20.0)
    assert stop.longest("save") == 20.0
    for seconds in (9.0, *[1.0] * 7):
        stop.took("save", seconds)
    assert stop.longest("save") == 9.0
    stop.took("save", 2.0)  # the ninth: the first is forgotten
    assert stop.longest("save") == 2.0


def test_the_limit_that_passes_in_other_work_is_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    stop = StopRequest(within=30, before=60)
    clock.seconds += 59
    stop.raise_if_requested()
    clock.seconds += 2
    with pytest.raises(StoppedError, match=r"stopped by `save_before`[\s\S]*more time") as caught:
        stop.raise_if_requested()
    assert caught.value.signal_number == signal.SIGTERM


def test_what_is_required_is_asked_at_every_safe_point() -> None:
    def check() -> None:
        raise LockedError("another process owns it")

    stop = StopRequest()
    stop.require(check)
    for safe_point in (stop.raise_if_requested, stop.is_due):
        with pytest.raises(LockedError):
            safe_point()


def test_the_wall_clock_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    stop = StopRequest(within=30, before=3600)
    for years in (1, -1):
        monkeypatch.setattr(time, "time", lambda years=years: 1.6e9 + years * 3e7)
        assert 3590 < stop.limit_seconds() <= 3600
        assert not stop.is_due("step")


def test_outside_of_the_main_thread_nothing_is_caught() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen: list[object] = []

    def work() -> None:
        with stop_requests(owns_process=True) as stop:
            seen.append((stop.number, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(0, before)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_other_commands_end_at_once_by_what_no_library_swallows(number: signal.Signals) -> None:
    def work() -> None:
        try:
            os.kill(os.getpid(), number)
            time.sleep(5)
        except Exception as error:
            raise AssertionError from error

    before = signal.getsignal(number)
    with pytest.raises(Terminated) as caught, ends_at_once():
        work()
    assert caught.value.code == 143
    assert signal.getsignal(number) == before


def test_the_process_began_before_this_test_and_after_the_machine() -> None:
    began, now = clocks.process_start(), clocks.clock()
    assert 0 <= began <= now
    assert now - began < 24 * 3600


def test_a_process_is_named_by_its_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stat = "7 (a) name) of) many) S 1 7 7 0 -1 4194304 100 0 0 0 1 2 0 0 20 0 1 0 8877 1000 200"
    (tmp_path / "7").mkdir()
    (tmp_path / "7/stat").write_text(stat)
    monkeypatch.setattr(clocks, "PROC", tmp_path)
    assert clocks.start_ticks(7) == 8877
    assert clocks.start_ticks(8) is None
    assert clocks.boot_id() == ""
    assert clocks.process_start() == pytest.approx(clocks.clock(), abs=1.0)
