"""Settings that came with a later release: a result of an earlier one does not name them.

In: a stage's settings. Out: the same without those that stand at what earlier releases did, so that their checkpoints
and results are still known by the same settings (R7). Must not know: files.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from tunesmith.recipe.stages import StageBase, SupervisedStage
from tunesmith.recipe.yaml12 import Value

LATER: Mapping[str, Value] = {
    "optimizer": "adamw",
    "sft_weight": 0.0,
    "pair_weights": "none",
    "length_desensitization": 1.0,
    "weighting": "none",
    "reference_update": None,
    "samples": None,
    "divergence": "reverse_kl",
    "divergence_alpha": 0.5,
    "best_metric": "loss",
    "best_mode": None,
    "patience": 0,
    "min_improvement": 0.0,
    "margin": "none",
    "margin_scale": 1.0,
    "on_diagnosis": "warn",
    "kl_budget": 10.0,
}
"""Keys of a stage, with the value that stands for what releases did that had no such key."""
LATER_SUPERVISED: Mapping[str, Value] = {"label_smoothing": 0.0, "neftune_alpha": 0.0}
"""The same of supervised stages only: DPO had its `label_smoothing` from the start."""
LATER_TUNING: Mapping[str, Value] = {
    "train_only": [],
    "freeze": [],
    "rslora": False,
    "dora": False,
    "init": "zero",
    "b_lr_ratio": 1.0,
    "modules_to_save": [],
}
"""The same of `tuning`."""


def settings_of(stage: StageBase, *, without: Collection[str] = ()) -> dict[str, Value]:
    """The stage's settings in plain values, as the oldest release that can say them would write them down."""
    found: dict[str, Value] = stage.model_dump(mode="json", exclude=set(without))
    tuning = found.get("tuning")
    if isinstance(tuning, dict):
        found["tuning"] = _without_later(tuning, LATER_TUNING)
    return _without_later(found, {**LATER, **LATER_SUPERVISED} if isinstance(stage, SupervisedStage) else LATER)


def _without_later(values: Mapping[str, Value], later: Mapping[str, Value]) -> dict[str, Value]:
    return {name: value for name, value in values.items() if name not in later or later[name] != value}
