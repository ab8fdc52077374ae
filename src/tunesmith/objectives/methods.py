"""Every method by name: how its objective is made of a recipe stage's settings.

In: a recipe stage. Out: its objective. Must not know: what a method computes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from tunesmith.objectives.alphapo import alphapo
from tunesmith.objectives.aot import aot, aot_unpaired
from tunesmith.objectives.apo import apo_down, apo_zero
from tunesmith.objectives.base import Objective
from tunesmith.objectives.bco import bco
from tunesmith.objectives.bco_unpaired import bco_unpaired
from tunesmith.objectives.best_against_rest import best_against_rest
from tunesmith.objectives.cpo import cpo
from tunesmith.objectives.discopop import discopop
from tunesmith.objectives.dpo import dpo
from tunesmith.objectives.exo import exo
from tunesmith.objectives.hinge import hinge
from tunesmith.objectives.ipo import ipo
from tunesmith.objectives.kto import kto
from tunesmith.objectives.live import following
from tunesmith.objectives.mixture import mixture
from tunesmith.objectives.nca import nca
from tunesmith.objectives.orpo import orpo
from tunesmith.objectives.pairs import PairOptions
from tunesmith.objectives.plackett_luce import plackett_luce
from tunesmith.objectives.reward import reward
from tunesmith.objectives.robust import robust_dpo
from tunesmith.objectives.sigmoid_norm import sigmoid_norm
from tunesmith.objectives.simpo import simpo
from tunesmith.objectives.sppo import sppo
from tunesmith.objectives.supervised import supervised
from tunesmith.recipe.preferences import (
    AlphapoStage,
    AotStage,
    AotUnpairedStage,
    ApoDownStage,
    ApoZeroStage,
    BcoStage,
    BcoUnpairedStage,
    BestAgainstRestStage,
    CpoStage,
    DiscopopStage,
    DpoStage,
    ExoStage,
    HingeStage,
    IpoStage,
    KtoStage,
    MixtureStage,
    NcaStage,
    OrpoStage,
    PairedStage,
    PlackettLuceStage,
    ReferenceStage,
    RewardStage,
    RobustDpoStage,
    SigmoidNormStage,
    SimpoStage,
    SppoStage,
    reference_update_of,
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


def _dpo(stage: DpoStage) -> Objective:
    return dpo(
        stage.beta,
        stage.label_smoothing,
        divergence=stage.divergence,
        divergence_alpha=stage.divergence_alpha,
        margin_scale=stage.margin_scale if stage.margin == "scores" else 0.0,
        options=options(stage),
    )


def _kto(stage: KtoStage) -> Objective:
    return kto(stage.beta, stage.desirable_weight, stage.undesirable_weight)


def _bco_unpaired(stage: BcoUnpairedStage) -> Objective:
    return bco_unpaired(stage.beta, stage.desirable_weight, stage.undesirable_weight)


METHODS: dict[str, Make] = dict(
    [
        of(SftStage, lambda stage: supervised(stage.method, label_smoothing=stage.label_smoothing)),
        of(CompletionStage, lambda stage: supervised(stage.method, label_smoothing=stage.label_smoothing)),
        of(DpoStage, _dpo),
        of(RewardStage, lambda stage: reward(margins=stage.margin == "scores", centering=stage.centering)),
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
        of(BcoStage, lambda stage: bco(stage.beta, options=options(stage))),
        of(MixtureStage, lambda stage: mixture(stage.beta, stage.weights, options=options(stage))),
        of(OrpoStage, lambda stage: orpo(stage.beta, options=options(stage))),
        of(SimpoStage, lambda stage: simpo(stage.beta, stage.gamma, options=options(stage))),
        of(CpoStage, lambda stage: cpo(stage.beta, stage.label_smoothing, options=options(stage))),
        of(AlphapoStage, lambda stage: alphapo(stage.beta, stage.gamma, stage.alpha, options=options(stage))),
        of(KtoStage, _kto),
        of(BcoUnpairedStage, _bco_unpaired),
        of(PlackettLuceStage, lambda stage: plackett_luce(stage.beta)),
        of(BestAgainstRestStage, lambda stage: best_against_rest(stage.beta)),
    ]
)


def objective_of(stage: StageBase) -> Objective:
    """The objective that a recipe stage names, with its settings."""
    found, update = METHODS[stage.method](stage), reference_update_of(stage)
    if update is None:
        return found
    return following(found, alpha=1.0 if update.mode == "hard" else update.alpha, every=update.every)
