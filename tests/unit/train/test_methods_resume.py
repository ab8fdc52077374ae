"""BCO carries the mean reward so far (as mixtures do): a broken-off stage goes on as if it had not been (R1)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.support.training import Trial
from tunesmith.recipe.models import Lora, Source
from tunesmith.recipe.preferences import BcoStage
from tunesmith.runs.records import Value
from tunesmith.train.checkpoint import OPTIMIZER, STATE, WEIGHTS
from tunesmith.train.progress import Silent

SHORT: dict[str, Any] = {"train": [Source(path="x")], "batch_size": 4, "forest_tokens": 90, "tuning": Lora(r=4)}
CADENCE: dict[str, Any] = {"learning_rate": 5e-3, "epochs": 2, "max_steps": 4, "save_every": 1}


class Crash(Silent):
    """The process dies before step 3 is written down."""

    def stepped(self, record: Mapping[str, Value], timing: Mapping[str, Value]) -> None:
        if record["step"] == 3:
            raise ConnectionAbortedError


def test_the_shift_goes_on_where_it_was(tmp_path: Path) -> None:
    stage = BcoStage(name="bco", **SHORT, **CADENCE)
    whole, broken = (Trial(tmp_path / name, stage) for name in ("whole", "broken"))
    whole.run()
    with pytest.raises(ConnectionAbortedError):
        broken.run(Crash())
    assert broken.run()[0].resumed_step == 2
    for name in ("metrics.jsonl", *(f"checkpoints/step-4/{file}" for file in (WEIGHTS, OPTIMIZER, STATE))):
        assert (broken.folder / name).read_bytes() == (whole.folder / name).read_bytes(), name
    assert "reward_shift" in (whole.folder / "metrics.jsonl").read_text()
