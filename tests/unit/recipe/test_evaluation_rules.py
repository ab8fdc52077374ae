"""What is measured must have something to be measured on."""

from __future__ import annotations

from typing import Any

import pytest

from tunesmith.recipe.evaluation_rules import evaluation_rules
from tunesmith.recipe.models import CompletionStage, SftStage, Source
from tunesmith.recipe.preferences import DpoStage, KtoStage, ReferenceUpdate, RewardStage, SimpoStage, samples_of
from tunesmith.recipe.stages import Samples, StageBase


def stage_of(kind: type[StageBase] = DpoStage, **changes: Any) -> StageBase:
    return kind(**({"name": "s", "train": [Source(path="x")], "heldout_fraction": 0.1} | changes))


def keys(stage: StageBase) -> list[str]:
    return [".".join(str(part) for part in problem.path) for problem in evaluation_rules(stage, ())]


@pytest.mark.parametrize("kind", [DpoStage, KtoStage])
def test_the_best_against_a_moving_reference_is_refused(kind: type[StageBase]) -> None:
    moving = {"reference_update": ReferenceUpdate(), "eval_every": 5}
    assert keys(stage_of(kind, **moving)) == []
    assert keys(stage_of(kind, **moving, keep="best")) == ["best_metric"]
    assert keys(stage_of(kind, **moving, patience=2)) == ["best_metric"]
    assert keys(stage_of(kind, **moving, keep="best", best_metric="retained_loss")) == []
    assert keys(stage_of(kind, eval_every=5, keep="best")) == []


def test_a_hard_update_has_no_alpha() -> None:
    assert keys(stage_of(reference_update=ReferenceUpdate(mode="hard"))) == []
    assert keys(stage_of(reference_update=ReferenceUpdate(mode="hard", alpha=0.3))) == ["reference_update.alpha"]


def test_answers_need_prompts_and_a_policy() -> None:
    assert keys(stage_of(samples=Samples())) == []
    assert keys(stage_of(samples=Samples(), heldout_fraction=0.0)) == ["samples"]
    assert keys(stage_of(samples=Samples(num_prompts=0), heldout_fraction=0.0)) == []
    assert keys(stage_of(RewardStage, samples=Samples())) == ["samples"]
    assert keys(stage_of(CompletionStage, samples=Samples())) == ["samples"]


def test_they_are_drawn_by_default_where_a_preference_stage_evaluates_on_the_way() -> None:
    def count(stage: StageBase) -> int:
        return samples_of(stage).num_prompts

    assert count(stage_of(eval_every=5)) == count(stage_of(SimpoStage, eval_every=5)) == 8
    assert (
        count(stage_of()) == count(stage_of(SftStage, eval_every=5)) == count(stage_of(RewardStage, eval_every=5)) == 0
    )
    assert count(stage_of(SftStage, samples=Samples(num_prompts=3))) == 3
    assert count(stage_of(eval_every=5, samples=Samples(num_prompts=0))) == 0
