"""Settings of a preference loss that would do nothing, or nothing at all.

In: a stage whose every field is right. Out: a `Problem` for each broken rule. Must not know: what a method computes.
"""

from __future__ import annotations

from collections.abc import Iterator

from tunesmith.recipe.preferences import DpoStage, MixtureStage
from tunesmith.recipe.problems import Problem
from tunesmith.recipe.stages import StageBase
from tunesmith.recipe.yaml12 import KeyPath


def loss_rules(stage: StageBase, path: KeyPath) -> Iterator[Problem]:
    """Broken rules between the settings of one loss."""
    if isinstance(stage, MixtureStage) and not any(stage.weights.model_dump().values()):
        yield Problem((*path, "weights"), "every weight is 0, so nothing would be trained: give one of them")
    if isinstance(stage, DpoStage):
        yield from _unused(stage, path, "divergence_alpha", stage.divergence == "alpha", "divergence: alpha")
        yield from _unused(stage, path, "margin_scale", stage.margin == "scores", "margin: scores")


def _unused(stage: DpoStage, path: KeyPath, name: str, is_used: bool, by: str) -> Iterator[Problem]:
    """A key that says something which nothing reads."""
    values = stage.model_dump()
    if not is_used and values[name] != DpoStage.model_fields[name].default:
        yield Problem((*path, name), f"is read with `{by}` only: set that too, or leave {name} out")
