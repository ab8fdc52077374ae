"""The rules between a stage's tuning, its optimizer, and the model.

In: a recipe's model and one of its stages. Out: a `Problem` for each broken rule.
Must not know: files, models' insides.
"""

from __future__ import annotations

from collections.abc import Iterator

from tunesmith.recipe.models import Full, Lora, Model, Stage
from tunesmith.recipe.preferences import reference_update_of
from tunesmith.recipe.problems import Problem
from tunesmith.recipe.yaml12 import KeyPath

OWN_BETAS = {"adafactor": "keeps no running mean", "lion": "always uses its paper's 0.9 and 0.99"}
"""Optimizers that `adam_beta1` and `adam_beta2` say nothing to, and why."""


def tuning_problems(model: Model, stage: Stage, path: KeyPath) -> Iterator[Problem]:
    """Every broken rule of one stage."""
    tuning, where = stage.tuning, (*path, "tuning")
    if isinstance(tuning, Full):
        if model.quantization != "none":
            text = f"{model.quantization} weights cannot be trained: use lora, or model.quantization: none"
            yield Problem((*where, "kind"), text)
    else:
        yield from _lora(model, tuning, where)
    yield from _optimizer(stage, path)


def _lora(model: Model, lora: Lora, where: KeyPath) -> Iterator[Problem]:
    if lora.target_modules == []:
        yield Problem((*where, "target_modules"), "must name at least one module, or be all-linear")
    if lora.dora and lora.init != "zero":
        yield Problem((*where, "dora"), f"begins with the weights as they are: use init: zero, not {lora.init}")
    if lora.init == "pissa" and model.quantization != "none":
        text = f"pissa splits weights that are not quantized: use loftq (nf4) or zero with {model.quantization}"
        yield Problem((*where, "init"), text)
    if lora.init == "loftq" and model.quantization != "nf4":
        text = f"loftq fills in what nf4 rounds away, and model.quantization is {model.quantization}: use zero or pissa"
        yield Problem((*where, "init"), text)
    if len(set(lora.modules_to_save)) < len(lora.modules_to_save):
        yield Problem((*where, "modules_to_save"), "names a layer twice")


def _optimizer(stage: Stage, path: KeyPath) -> Iterator[Problem]:
    if stage.optimizer == "schedule_free" and stage.schedule != "constant":
        text = "schedule_free averages the weights instead of lowering the rate: set schedule: constant"
        yield Problem((*path, "schedule"), f"{text} (a warm-up is fine)")
    if stage.optimizer == "schedule_free" and stage.adam_beta1 == 0:
        yield Problem((*path, "adam_beta1"), "schedule_free mixes the average in with it: must be above 0")
    if stage.optimizer == "schedule_free" and reference_update_of(stage) is not None:
        yield Problem((*path, "optimizer"), "a live reference follows single steps, not their average: use adamw")
    if stage.optimizer in OWN_BETAS:
        for key, value, usual in (("adam_beta1", stage.adam_beta1, 0.9), ("adam_beta2", stage.adam_beta2, 0.999)):
            if value != usual:
                text = f"{stage.optimizer} {OWN_BETAS[stage.optimizer]}, so this would be ignored: leave it out"
                yield Problem((*path, key), text)
