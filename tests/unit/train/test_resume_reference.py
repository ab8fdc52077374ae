"""A reference that moved by rounding between two starts of a stage."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.train.test_resume import Crash, Notes, edit_state, unbroken
from tunesmith.train.checkpoint import STATE


def test_a_reference_that_was_scored_anew_in_another_packing_is_told(tmp_path: Path) -> None:
    whole, _ = unbroken("dpo, lora, dropout")
    trial = replace(whole, folder=tmp_path)
    with pytest.raises(ConnectionAbortedError):
        trial.run(Crash(3))
    path = tmp_path / "checkpoints/step-2"
    mean = json.loads((path / STATE).read_text())["reference_mean"]
    edit_state(path, {"reference_mean": mean + 1e-7})
    notes = Notes()
    trial.run(notes)
    (told,) = [text for text in notes.texts if "the result can differ in rounding" in text]
    assert "the reference's mean log-prob" in told
