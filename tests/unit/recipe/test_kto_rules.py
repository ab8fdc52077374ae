from __future__ import annotations

from tunesmith.recipe.models import Model, Recipe, Source
from tunesmith.recipe.preferences import BcoUnpairedStage, KtoStage
from tunesmith.recipe.rules import broken_rules


def problems(stage: KtoStage | BcoUnpairedStage) -> list[str]:
    recipe = Recipe(name="r", model=Model(path="m"), stages=[stage])
    return [".".join(map(str, problem.path)) for problem in broken_rules(recipe)]


def test_kto_needs_more_than_one_answer_a_step() -> None:
    """TRAPS 49: the drift of one answer is no mean."""
    train = [Source(path="x")]
    assert problems(KtoStage(name="k", train=train, batch_size=1)) == ["stages.0.batch_size"]
    assert problems(KtoStage(name="k", train=train, batch_size=2)) == []
    assert problems(BcoUnpairedStage(name="b", train=train, batch_size=1)) == []
