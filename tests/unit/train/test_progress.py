from __future__ import annotations

import io

import pytest
from rich.console import Console

from tunesmith.train import progress
from tunesmith.train.progress import Eta, LiveLine, PlainLines, clock, observer_for

RECORD = {"step": 5, "loss": 1.25, "lr": 2e-4, "num_examples": 4}
TIMING = {"step": 5, "tokens_per_second": 1234.5, "examples_per_second": 6.25, "memory_bytes": 3 * 2**29}
FIGURES = "loss 1.2500  lr 2.00e-04  1,234 tokens/s  6.2 examples/s  1.50 GiB"


def test_plain_line_has_every_figure() -> None:
    stream = io.StringIO()
    lines = PlainLines(stream)
    lines.started("sft", first_step=4, num_steps=20)
    lines.stepped(RECORD, TIMING)
    lines.evaluated({"step": 5, "loss": 0.5, "num_examples": 7})
    lines.noted("hello")
    lines.finished()
    said = stream.getvalue().splitlines()
    assert said[0] == "[sft] 20 steps, going on after step 4"
    assert said[1] == f"[sft] step 5/20  {FIGURES}  0:00 left"
    assert said[2:] == ["[sft] step 5: held-out loss 0.5000 (7 held-out examples)", "[sft] hello"]


def test_plain_lines_are_few() -> None:
    stream = io.StringIO()
    lines = PlainLines(stream)
    lines.started("sft", first_step=0, num_steps=1000)
    for step in range(1, 1001):
        lines.stepped(RECORD | {"step": step}, TIMING)
    assert len(stream.getvalue().splitlines()) == 1 + 1 + 20  # the head, step 1, every 50th


def test_preference_line_has_accuracy_and_margin() -> None:
    stream = io.StringIO()
    lines = PlainLines(stream)
    lines.started("dpo", first_step=0, num_steps=5)
    lines.stepped(RECORD | {"accuracy": 0.75, "margin": 0.5}, TIMING)
    assert "accuracy 0.75  margin 0.500" in stream.getvalue()


def test_live_line_shows_the_figures_and_ends() -> None:
    stream = io.StringIO()
    live = LiveLine(Console(file=stream, force_terminal=True, width=160))
    live.started("sft", first_step=4, num_steps=20)
    live.stepped(RECORD, TIMING)
    live.noted("[bold]not markup[/bold]")
    live.finished()
    live.finished()
    assert "1,234 tokens/s" in stream.getvalue()
    assert "5/20" in stream.getvalue()
    assert "[bold]not markup[/bold]" in stream.getvalue()


def test_no_terminal_gives_plain_lines() -> None:
    assert isinstance(observer_for(io.StringIO()), PlainLines)


def test_time_left_is_the_median_so_a_pause_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """F18: steps of 2 s, one of an hour; 10 steps are left."""
    moments = iter([0.0, 2.0, 4.0, 3604.0, 3606.0, 3608.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(moments))
    eta = Eta(15)
    assert [eta.seconds_left(step) for step in range(1, 6)][-1] == 2.0 * 10


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3723, "1:02:03"), (-5, "0:00")])
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text
