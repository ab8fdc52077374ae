"""Which of two evaluations is better, and the rules of the keys that ask for it.

In: a stage's settings. Out: a direction; a `Problem` for each broken rule. Must not know: files, how a figure is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

from tunesmith.recipe.problems import Problem
from tunesmith.recipe.stages import StageBase
from tunesmith.recipe.yaml12 import KeyPath

Mode = Literal["min", "max"]

DIRECTIONS: Mapping[str, Mode] = {
    "loss": "min",
    "nll": "min",
    "retained_loss": "min",
    "accuracy": "max",
    "margin": "max",
    "reward_chosen": "max",
    "reward_rejected": "min",
    "reward_desirable": "max",
    "reward_undesirable": "min",
    "logprob_chosen": "max",
    "logratio_chosen": "max",
    "brier": "min",
    "calibration_error": "min",
    "sample_kl": "min",
    "sample_truncated": "min",
    "sample_repetition": "min",
    "sample_language": "max",
}
"""Figures of eval.jsonl of which it is known whether more or less is better; of others `best_mode` says it."""


def direction_of(stage: StageBase) -> Mode:
    """Whether the stage's `best_metric` is to be low or high."""
    return stage.best_mode or DIRECTIONS[stage.best_metric]


def best_rules(stage: StageBase, path: KeyPath) -> Iterator[Problem]:
    """What `best_metric`, `patience` and `min_improvement` need beside them."""
    is_asked = stage.keep == "best" or stage.patience > 0
    if stage.best_mode is None and stage.best_metric not in DIRECTIONS:
        what = f"it is not known whether {stage.best_metric!r} is to be low or high: set best_mode to min or max"
        yield Problem((*path, "best_metric"), what)
    if not is_asked:
        for name in ("best_metric", "best_mode"):
            if name in stage.model_fields_set and (stage.best_metric, stage.best_mode) != ("loss", None):
                yield Problem((*path, name), "nothing is chosen by it: set keep: best, or patience")
                break
    if stage.min_improvement and not stage.patience:
        yield Problem((*path, "min_improvement"), "nothing is stopped by it: set patience")
    if stage.patience:
        if not stage.heldout and stage.heldout_fraction == 0:
            yield Problem((*path, "patience"), "it needs held-out rows: set heldout or heldout_fraction")
        elif stage.eval_every == 0:
            yield Problem((*path, "patience"), "it counts evaluations: set eval_every")
