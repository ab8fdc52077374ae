"""Rules between what a stage measures and what there is to measure it on or against.

In: a stage whose every field is right. Out: a `Problem` for each broken rule. Must not know: files, data, figures.
"""

from __future__ import annotations

from collections.abc import Iterator

from tunesmith.recipe.preferences import ReferenceUpdate, reference_update_of
from tunesmith.recipe.problems import Problem
from tunesmith.recipe.stages import StageBase
from tunesmith.recipe.yaml12 import KeyPath

_ALPHA = ReferenceUpdate.model_fields["alpha"].default


def evaluation_rules(stage: StageBase, path: KeyPath) -> Iterator[Problem]:
    """Every broken rule of one stage."""
    if stage.samples is not None and stage.samples.num_prompts > 0:
        yield from _samples(stage, (*path, "samples"))
    update = reference_update_of(stage)
    if update is None:
        return
    if update.mode == "hard" and update.alpha != _ALPHA:
        yield Problem((*path, "reference_update", "alpha"), "a hard update takes the whole policy: leave alpha out")
    if (stage.keep == "best" or stage.patience > 0) and not stage.best_metric.startswith(("sample_", "retained_")):
        yield Problem(
            (*path, "best_metric"),
            f"the reference moves, so {stage.best_metric!r} of two evaluations is not against the same model: use "
            "keep: final without patience, or a best_metric such as retained_loss",
        )


def _samples(stage: StageBase, path: KeyPath) -> Iterator[Problem]:
    if not stage.makes_policy:
        yield Problem(path, "a reward model writes no answers; leave it out")
    elif stage.rows == "text":
        yield Problem(path, "plain texts have no prompts to answer; leave it out")
    elif not stage.heldout and stage.heldout_fraction == 0:
        yield Problem(path, "there are no held-out prompts: set heldout or heldout_fraction, or num_prompts: 0")
