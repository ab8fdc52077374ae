"""Objectives by name. In: a recipe stage. Out: the pure function that the loop calls. Must not know: models."""

from __future__ import annotations

from tunesmith.objectives.base import Carried, Carrying, Objective, Result, Sum
from tunesmith.objectives.dpo import dpo, dpo_loss
from tunesmith.objectives.methods import METHODS, objective_of
from tunesmith.objectives.supervised import nll_loss, supervised

__all__ = [
    "METHODS",
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
