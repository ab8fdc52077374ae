"""Settings of a preference loss that would do nothing."""

from __future__ import annotations

from typing import Any

import pytest

from tunesmith.recipe.loss_rules import loss_rules
from tunesmith.recipe.models import Source
from tunesmith.recipe.preferences import DpoStage, MixtureStage, MixtureWeights

NONE = dict.fromkeys(MixtureWeights.model_fields, 0.0)


def dpo_problems(**changes: Any) -> list[str]:
    stage = DpoStage(name="dpo", train=[Source(path="x")], **changes)
    return [str(problem.path[-1]) for problem in loss_rules(stage, ())]


def test_a_mixture_of_nothing_is_refused() -> None:
    stage = MixtureStage(name="mixture", train=[Source(path="x")], weights=MixtureWeights(**NONE))
    (problem,) = loss_rules(stage, ("stages", 0))
    assert problem.path == ("stages", 0, "weights")
    half = stage.model_copy(update={"weights": MixtureWeights(**(NONE | {"ipo": 0.5}))})
    assert list(loss_rules(half, ())) == []


@pytest.mark.parametrize(
    ("key", "value", "by"),
    [("divergence_alpha", 0.3, {"divergence": "alpha"}), ("margin_scale", 2.0, {"margin": "scores"})],
)
def test_a_setting_that_nothing_reads_is_refused(key: str, value: float, by: dict[str, str]) -> None:
    assert dpo_problems(**{key: value}) == [key]
    assert dpo_problems(**{key: value}, **by) == []
    assert dpo_problems() == []
