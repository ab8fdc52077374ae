"""Every method by name: how its objective is made of a recipe stage's settings.

In: a recipe stage. Out: its objective. Must not know: what a method computes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from tunesmith.objectives.base import Objective
from tunesmith.objectives.dpo import dpo
from tunesmith.objectives.pairs import PairOptions
from tunesmith.objectives.supervised import supervised
from tunesmith.recipe.preferences import DpoStage, PairedStage, ReferenceStage
from tunesmith.recipe.stages import CompletionStage, SftStage, StageBase

S = TypeVar("S", bound=StageBase)
Make = Callable[[StageBase], Objective]


def of(kind: type[S], make: Callable[[S], Objective]) -> tuple[str, Make]:
    """A method's name, and how its objective is made of a stage of this kind."""

    def made(stage: StageBase) -> Objective:
        assert isinstance(stage, kind)
        return make(stage)

    return str(kind.model_fields["method"].default), made


def options(stage: PairedStage) -> PairOptions:
    """What the recipe changes about a paired method."""
    desensitized, is_wpo = 1.0, False
    if isinstance(stage, ReferenceStage):
        desensitized, is_wpo = stage.length_desensitization, stage.weighting == "wpo"
    return PairOptions(stage.sft_weight, stage.pair_weights == "rows", desensitized, is_wpo)


METHODS: dict[str, Make] = dict(
    [
        of(SftStage, lambda stage: supervised(stage.method)),
        of(CompletionStage, lambda stage: supervised(stage.method)),
        of(DpoStage, lambda stage: dpo(stage.beta, stage.label_smoothing, options=options(stage))),
    ]
)


def objective_of(stage: StageBase) -> Objective:
    """The objective that a recipe stage names, with its settings."""
    return METHODS[stage.method](stage)
