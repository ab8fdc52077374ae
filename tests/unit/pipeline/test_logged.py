"""The observer that writes the run's log: everything arrives, in order, without secrets, whatever the disk does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tunesmith.errors import NumericsError, StoppedError
from tunesmith.pipeline.logged import Logged
from tunesmith.train.progress import PlainLines, Silent

HF = "hf_" + "aB3dE6gH9jK2mN5pQ8sT1vW4"


class Notes(Silent):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def noted(self, text: str) -> None:
        self.texts.append(text)


def events(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_what_was_said_before_there_was_a_folder_comes_first(tmp_path: Path) -> None:
    logged = Logged(Silent())
    logged.noted("WARNING: few rows")
    with logged.writing(tmp_path):
        logged.started("sft", first_step=0, num_steps=3)
        logged.evaluated({"step": 0, "loss": 2.0, "num_examples": 4})
        logged.finished()
    found = [(event["level"], event.get("stage"), event["text"]) for event in events(tmp_path)]
    assert found == [
        ("warning", None, "WARNING: few rows"),
        ("info", "sft", "3 steps"),
        ("info", "sft", "step 0: held-out loss 2.0000 (4 held-out examples)"),
        ("info", None, "the run is finished"),
    ]


def test_steps_are_logged_now_and_then_and_the_last_one(tmp_path: Path) -> None:
    clock = iter(float(second) for second in range(0, 700, 7))
    logged = Logged(Silent(), clock=lambda: next(clock))
    with logged.writing(tmp_path):
        logged.started("sft", first_step=0, num_steps=12)
        for step in range(1, 13):
            logged.stepped({"step": step, "loss": 1.0}, {"step": step, "seconds": 7.0})
    assert [event["step"] for event in events(tmp_path) if "loss" in str(event["text"])] == [1, 6, 11, 12]


def test_secrets_reach_neither_the_terminal_nor_the_log(tmp_path: Path) -> None:
    notes = Notes()
    logged = Logged(notes)
    with pytest.raises(ValueError), logged.writing(tmp_path):
        logged.noted(f"downloaded with {HF}")
        raise ValueError(f"the server refused {HF}")
    assert notes.texts == ["downloaded with [SECRET]"]
    assert HF not in (tmp_path / "log.jsonl").read_text()


def test_an_error_ends_there_with_its_traceback(tmp_path: Path) -> None:
    logged = Logged(Silent())
    with pytest.raises(NumericsError), logged.writing(tmp_path):
        logged.started("dpo", first_step=4, num_steps=9)
        raise NumericsError("the loss is not finite", where="step 5", remedy="Lower the learning rate.")
    last = events(tmp_path)[-1]
    assert (last["level"], last["kind"], last["stage"], last["step"]) == ("error", "NumericsError", "dpo", 4)
    assert last["text"] == "step 5: the loss is not finite\n  Lower the learning rate."
    assert "test_logged.py" in str(last["traceback"])


def test_a_stop_is_no_error(tmp_path: Path) -> None:
    logged = Logged(Silent())
    with pytest.raises(StoppedError), logged.writing(tmp_path):
        raise StoppedError("stopped after step 3", signal_number=15)
    assert [event["level"] for event in events(tmp_path)] == ["warning"]


def test_a_log_that_cannot_be_written_is_said_once_and_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").mkdir()
    notes = Notes()
    logged = Logged(notes)
    with logged.writing(tmp_path):
        logged.noted("one")
        logged.noted("two")
    said = [text for text in notes.texts if "cannot be written" in text]
    assert len(said) == 1 and said[0].endswith("the run goes on without it")
    assert notes.texts[-1] == "two"


def test_a_terminal_that_is_gone_stops_nothing(tmp_path: Path) -> None:
    class Gone:
        def write(self, text: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

        def flush(self) -> None:
            raise BrokenPipeError(32, "Broken pipe")

    logged = Logged(PlainLines(Gone()))  # type: ignore[arg-type]
    with logged.writing(tmp_path):
        logged.started("sft", first_step=0, num_steps=1)
        logged.noted("still here")
    assert [event["text"] for event in events(tmp_path)] == ["1 steps", "still here", "the run is finished"]
