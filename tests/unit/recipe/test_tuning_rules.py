"""What tuning, optimizer and model must not be together, and the sentence that says so."""

from __future__ import annotations

from typing import Any

import pytest

from tunesmith.recipe.later import settings_of
from tunesmith.recipe.models import DpoStage, Full, Lora, Model, Source
from tunesmith.recipe.preferences import ReferenceUpdate
from tunesmith.recipe.tuning_rules import tuning_problems

PLAIN = Model(path="base")
NF4, INT8 = (Model(path="base", quantization=kind) for kind in ("nf4", "int8"))

AVERAGED: dict[str, Any] = {"optimizer": "schedule_free", "schedule": "constant"}


def stage(**changes: Any) -> DpoStage:
    return DpoStage(**({"name": "dpo", "train": [Source(path="x")]} | changes))


@pytest.mark.parametrize(
    ("model", "changes", "path", "text"),
    [
        (NF4, {"tuning": Full()}, "tuning.kind", "nf4 weights cannot be trained"),
        (PLAIN, {"tuning": Lora(target_modules=[])}, "tuning.target_modules", "at least one module"),
        (PLAIN, {"tuning": Lora(dora=True, init="pissa")}, "tuning.dora", "use init: zero, not pissa"),
        (INT8, {"tuning": Lora(init="pissa")}, "tuning.init", "weights that are not quantized"),
        (PLAIN, {"tuning": Lora(init="loftq")}, "tuning.init", "model.quantization is none"),
        (INT8, {"tuning": Lora(init="loftq")}, "tuning.init", "model.quantization is int8"),
        (PLAIN, {"tuning": Lora(modules_to_save=["head", "head"])}, "tuning.modules_to_save", "twice"),
        (PLAIN, {"optimizer": "schedule_free"}, "schedule", "set schedule: constant"),
        (PLAIN, {"optimizer": "lion", "adam_beta2": 0.95}, "adam_beta2", "would be ignored"),
        (PLAIN, {"optimizer": "adafactor", "adam_beta1": 0.8}, "adam_beta1", "would be ignored"),
        (PLAIN, {"optimizer": "schedule_free", "schedule": "constant", "adam_beta1": 0.0}, "adam_beta1", "above 0"),
        (PLAIN, AVERAGED | {"reference_update": ReferenceUpdate()}, "optimizer", "follows single steps"),
    ],
)
def test_what_is_refused(model: Model, changes: dict[str, Any], path: str, text: str) -> None:
    (problem,) = tuning_problems(model, stage(**changes), ("stages", 0))
    assert ".".join(map(str, problem.path[2:])) == path
    assert text in problem.text


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        (NF4, {"tuning": Lora(init="loftq")}),
        (NF4, {"tuning": Lora(dora=True)}),
        (PLAIN, {"tuning": Lora(init="pissa", rslora=True, b_lr_ratio=16.0)}),
        (PLAIN, AVERAGED),
        (PLAIN, AVERAGED | {"reference_update": None}),
        (PLAIN, {"optimizer": "muon", "adam_beta2": 0.95}),
    ],
)
def test_what_is_not(model: Model, changes: dict[str, Any]) -> None:
    assert not list(tuning_problems(model, stage(**changes), ("stages", 0)))


def test_plain_settings_are_written_as_before_there_were_kinds() -> None:
    """R7: else no checkpoint of an earlier release would be known again."""
    plain = {"kind": "lora", "r": 16, "alpha": 32.0, "dropout": 0.0, "target_modules": "all-linear"}
    assert settings_of(stage())["tuning"] == plain
    assert settings_of(stage(tuning=Full()))["tuning"] == {"kind": "full"}
    assert settings_of(stage(tuning=Lora(dora=True)))["tuning"] == plain | {"dora": True}
