"""Objectives by name. In: a recipe stage. Out: the pure function that the loop calls. Must not know: models."""

from __future__ import annotations

from tunesmith.objectives.base import Carried, Carrying, Objective, Result, Sum
from tunesmith.objectives.dpo import dpo, dpo_loss
from tunesmith.objectives.supervised import nll_loss, supervised
from tunesmith.recipe.models import CompletionStage, DpoStage, SftStage

__all__ = [
    "Carried",
    "Carrying",
    "Objective",
    "Result",
    "Sum",
    "dpo",
    "dpo_loss",
    "nll_loss",
    "objective_of",
    "supervised",
]


def objective_of(stage: SftStage | CompletionStage | DpoStage) -> Objective:
    """The objective that a recipe stage names, with its settings."""
    if isinstance(stage, DpoStage):
        return dpo(stage.beta, stage.label_smoothing)
    return supervised(stage.method)
