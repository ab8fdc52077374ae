"""What one field cannot say: the rules between the fields of a recipe.

In: a recipe whose every field is right. Out: a `Problem` for each broken rule.
Must not know: files, lines, models, data; whatever needs those is checked by `tunesmith check`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from tunesmith.recipe.best import best_rules
from tunesmith.recipe.evaluation_rules import evaluation_rules
from tunesmith.recipe.loss_rules import loss_rules
from tunesmith.recipe.models import CompletionStage, Recipe, SftStage, Source, Stage
from tunesmith.recipe.preferences import AotStage, AotUnpairedStage, KtoStage
from tunesmith.recipe.problems import Problem
from tunesmith.recipe.tuning_rules import tuning_problems
from tunesmith.recipe.yaml12 import KeyPath

RESERVED_STAGES = ("base", "previous")  # `base` names the untrained model in comparisons, both are words of `start`
TEXT_FORMATS = ("auto", "text")


def broken_rules(recipe: Recipe) -> list[Problem]:
    """Every broken rule, stage by stage."""
    problems = list(_names(recipe))
    for number, stage in enumerate(recipe.stages):
        problems += _stage(recipe, stage, ("stages", number))
    return problems + list(_style(recipe))


def _names(recipe: Recipe) -> Iterator[Problem]:
    seen: dict[str, int] = {}
    for number, stage in enumerate(recipe.stages):
        path = ("stages", number, "name")
        if stage.name in RESERVED_STAGES:
            yield Problem(path, f"{stage.name!r} is a reserved word; give the stage another name")
        if stage.name in seen:
            yield Problem(path, f"{stage.name!r} is already the name of stages[{seen[stage.name]}]; names are folders")
        seen.setdefault(stage.name, number)


def _stage(recipe: Recipe, stage: Stage, path: KeyPath) -> Iterator[Problem]:
    if not stage.heldout and stage.heldout_fraction == 0:
        if stage.keep == "best":
            yield Problem((*path, "keep"), "'best' needs held-out rows: set heldout or heldout_fraction")
        if stage.eval_every > 0:
            yield Problem(
                (*path, "eval_every"), "there are no held-out rows: set heldout or heldout_fraction, or 0 here"
            )
    elif stage.keep == "best" and stage.eval_every == 0:
        yield Problem((*path, "keep"), "'best' needs evaluations to choose from: set eval_every")
    if stage.on_diagnosis == "rollback" and (stage.eval_every == 0 or not (stage.heldout or stage.heldout_fraction)):
        what = "'rollback' needs a best step to go back to: set eval_every, and heldout or heldout_fraction"
        yield Problem((*path, "on_diagnosis"), what)
    if stage.heldout and stage.heldout_fraction > 0:
        yield Problem((*path, "heldout_fraction"), "heldout already names the held-out rows; set only one of the two")
    yield from best_rules(stage, path)
    yield from evaluation_rules(stage, path)
    yield from _data(stage, path)
    yield from loss_rules(stage, path)
    yield from tuning_problems(recipe.model, stage, path)
    if isinstance(stage, AotStage | AotUnpairedStage):
        yield from _quantiles(stage, path)
    if isinstance(stage, CompletionStage):
        yield from _text_only(stage.train, (*path, "train"), "a completion stage trains plain text")
        yield from _text_only(stage.heldout, (*path, "heldout"), "a completion stage trains plain text")
    if isinstance(stage, KtoStage) and stage.batch_size == 1:
        yield Problem((*path, "batch_size"), "kto measures the policy's drift on a step's answers: set 2 or more")
    if isinstance(stage, SftStage) and stage.replay is not None:
        yield from _text_only(stage.replay.sources, (*path, "replay", "sources"), "replayed rows are plain text")


def _data(stage: Stage, path: KeyPath) -> Iterator[Problem]:
    weighted = [number for number, source in enumerate(stage.train) if source.weight is not None]
    if weighted and len(weighted) < len(stage.train):
        missing = next(number for number in range(len(stage.train)) if number not in weighted)
        yield Problem((*path, "train", missing, "weight"), "give every training source a weight, or none")
    for side in ("heldout", "replay"):
        sources = stage.heldout if side == "heldout" else _replayed(stage)
        place: KeyPath = (*path, "heldout") if side == "heldout" else (*path, "replay", "sources")
        for number, source in enumerate(sources):
            if source.weight is not None:
                yield Problem((*place, number, "weight"), "only training sources are drawn by weight")
    if stage.too_long == "split" and not isinstance(stage, CompletionStage):
        yield Problem((*path, "too_long"), "only plain text can be split: use drop, a truncate_... policy or stop")


def _quantiles(stage: AotStage | AotUnpairedStage, path: KeyPath) -> Iterator[Problem]:
    if stage.batch_size == 1:
        yield Problem((*path, "batch_size"), f"{stage.method} of 1 pair a step is DPO: set 2 or more, or method: dpo")
    for key, value in (("weighting", stage.weighting), ("pair_weights", stage.pair_weights)):
        if value != "none":
            yield Problem((*path, key), f"{stage.method} compares quantiles, not pairs, so none weighs more: set none")


def _replayed(stage: Stage) -> list[Source]:
    return stage.replay.sources if isinstance(stage, SftStage) and stage.replay is not None else []


def _text_only(sources: list[Source], path: KeyPath, reason: str) -> Iterator[Problem]:
    for number, source in enumerate(sources):
        if source.format not in TEXT_FORMATS:
            yield Problem((*path, number, "format"), f"{reason}: use text or auto, not {source.format}")


def _style(recipe: Recipe) -> Iterator[Problem]:
    style = recipe.compare.style
    if style is None:
        return
    try:
        re.compile(style.pattern)
    except re.error as error:
        yield Problem(("compare", "style", "pattern"), f"is not a regular expression: {error}")
