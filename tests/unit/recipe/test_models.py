"""The defaults that people get without asking, and what cannot be changed after loading."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from tunesmith.recipe.models import DpoStage, Lora, SftStage, Source


def test_defaults_of_sft() -> None:
    stage = SftStage(name="sft", train=[Source(path="a")])
    assert stage.learning_rate == 2e-4
    assert stage.tuning == Lora(r=16, alpha=32.0, dropout=0.0, target_modules="all-linear")
    assert (stage.schedule, stage.warmup_fraction, stage.max_grad_norm) == ("cosine", 0.03, 1.0)


def test_defaults_of_dpo() -> None:
    stage = DpoStage(name="dpo", train=[Source(path="a")])
    assert (stage.learning_rate, stage.beta, stage.epochs, stage.batch_size) == (5e-6, 0.1, 1, 16)
    assert stage.label_smoothing == 0.0


def test_a_whole_number_is_a_number() -> None:
    assert DpoStage(name="dpo", train=[Source(path="a")], beta=1).beta == 1.0


def test_nothing_changes_after_loading() -> None:
    stage = SftStage(name="sft", train=[Source(path="a")])
    with pytest.raises(ValidationError, match="frozen"):
        stage.learning_rate = 1.0  # type: ignore[misc]
