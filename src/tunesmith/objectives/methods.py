"""Every method by name: how its objective is made of a recipe stage's settings.

In: a recipe stage. Out: its objective. Must not know: what a method computes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from tunesmith.objectives.aot import aot, aot_unpaired
from tunesmith.objectives.apo import apo_down, apo_zero
from tunesmith.objectives.base import Objective
from tunesmith.objectives.discopop import discopop
from tunesmith.objectives.dpo import dpo
from tunesmith.objectives.exo import exo
from tunesmith.objectives.hinge import hinge
from tunesmith.objectives.ipo import ipo
from tunesmith.objectives.nca import nca
from tunesmith.objectives.pairs import PairOptions
from tunesmith.objectives.robust import robust_dpo
from tunesmith.objectives.sigmoid_norm import sigmoid_norm
from tunesmith.objectives.sppo import sppo
from tunesmith.objectives.supervised import supervised
from tunesmith.recipe.preferences import (
    AotStage,
    AotUnpairedStage,
    ApoDownStage,
    ApoZeroStage,
    DiscopopStage,
    DpoStage,
    ExoStage,
    HingeStage,
    IpoStage,
    NcaStage,
    PairedStage,
    ReferenceStage,
    RobustDpoStage,
    SigmoidNormStage,
    SppoStage,
)
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
        of(RobustDpoStage, lambda stage: robust_dpo(stage.beta, stage.label_smoothing, options=options(stage))),
        of(HingeStage, lambda stage: hinge(stage.beta, options=options(stage))),
        of(IpoStage, lambda stage: ipo(stage.beta, stage.normalization, options=options(stage))),
        of(ExoStage, lambda stage: exo(stage.beta, stage.label_smoothing, options=options(stage))),
        of(NcaStage, lambda stage: nca(stage.beta, options=options(stage))),
        of(SppoStage, lambda stage: sppo(stage.beta, options=options(stage))),
        of(SigmoidNormStage, lambda stage: sigmoid_norm(stage.beta, options=options(stage))),
        of(ApoZeroStage, lambda stage: apo_zero(stage.beta, options=options(stage))),
        of(ApoDownStage, lambda stage: apo_down(stage.beta, options=options(stage))),
        of(DiscopopStage, lambda stage: discopop(stage.beta, stage.temperature, options=options(stage))),
        of(AotStage, lambda stage: aot(stage.beta, stage.label_smoothing, options=options(stage))),
        of(AotUnpairedStage, lambda stage: aot_unpaired(stage.beta, stage.label_smoothing, options=options(stage))),
    ]
)


def objective_of(stage: StageBase) -> Objective:
    """The objective that a recipe stage names, with its settings."""
    return METHODS[stage.method](stage)
