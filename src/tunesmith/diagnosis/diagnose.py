"""Every diagnosis by name, of a stage that trains or of a run that is read.

In: records, or a run folder. Out: findings, problems first. Must not know: models, what is done about a finding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tunesmith.diagnosis import learning, preferences, samples
from tunesmith.diagnosis.base import Curves, Diagnosis, Look, Settings, Table
from tunesmith.errors import RunFolderError
from tunesmith.recipe.load import load_recipe
from tunesmith.recipe.models import Recipe
from tunesmith.recipe.stages import StageBase
from tunesmith.runs.folder import RunFolder, StageFolder, open_run
from tunesmith.runs.records import Record, read_records

DIAGNOSES: Mapping[str, Look] = {
    "reference is not the policy": preferences.wrong_reference,
    "likelihood displacement": preferences.likelihood_displacement,
    "length hacking": preferences.length_hacking,
    "margin stuck at zero": preferences.margin_stuck,
    "KL over its budget": preferences.kl_over_budget,
    "overfitting": learning.overfitting,
    "forgetting": samples.forgetting,
    "repetition": samples.repetition,
    "answers do not end": samples.truncation,
    "language drift": samples.language_drift,
    "learning rate too high": learning.rate_too_high,
    "dead adapter": learning.dead_adapter,
    "gradient spikes": learning.gradient_spikes,
    "saturation": preferences.saturation,
}
"""Every diagnosis, under the name that its findings bear."""


def diagnose(curves: Curves, settings: Settings) -> list[Diagnosis]:
    """What the records show now; problems come first."""
    found = [diagnosis for look in DIAGNOSES.values() if (diagnosis := look(curves, settings)) is not None]
    return sorted(found, key=lambda each: each.severity != "problem")


@dataclass(frozen=True, slots=True)
class StageFindings:
    """One stage of a run. `now`: what its records show at their end; `earlier`: diagnoses that were said in training
    and no longer hold; `warnings`: what else was said; `num_steps`: steps that there are records of."""

    stage: str
    method: str
    num_steps: int
    now: tuple[Diagnosis, ...]
    earlier: tuple[Record, ...]
    warnings: tuple[Record, ...]


def diagnose_stage(folder: StageFolder, stage: StageBase) -> StageFindings:
    """The findings of a stage's folder; a stage that has not begun has none. Raises RunFolderError (2)."""
    metrics, said = read_records(folder.metrics_path), read_records(folder.warnings_path)
    kinds: dict[str, int] = {}
    for line in said:
        step = line.get("step")
        kinds.setdefault(str(line.get("kind")), step if isinstance(step, int) else 0)
    is_over = folder.result_path.is_file()
    curves = Curves(Table(metrics), Table(read_records(folder.eval_path)), kinds, is_over)
    now = diagnose(curves, Settings.of(stage))
    names = {each.name for each in now}
    diagnosed = [line for line in said if "severity" in line]
    return StageFindings(
        stage.name,
        stage.method,
        curves.step,
        tuple(now),
        tuple(line for line in diagnosed if line.get("kind") not in names),
        tuple(line for line in said if "severity" not in line),
    )


def diagnose_run(folder: RunFolder, recipe: Recipe, stage: str | None = None) -> list[StageFindings]:
    """The findings of every stage that has begun, or of one. Raises RunFolderError (2)."""
    names = [each.name for each in recipe.stages]
    if stage is not None and stage not in names:
        remedy = f"The run has: {', '.join(names)}."
        raise RunFolderError(f"there is no stage {stage!r}", where=str(folder.path), remedy=remedy)
    wanted = [each for each in recipe.stages if stage in (None, each.name)]
    return [diagnose_stage(folder.stage(each.name), each) for each in wanted if _has_begun(folder.stage(each.name))]


def read_run(path: Path, stage: str | None = None) -> list[StageFindings]:
    """The findings of a run folder. Raises RunFolderError (2), or RecipeError where its recipe cannot be read."""
    folder = open_run(path)
    return diagnose_run(folder, load_recipe(folder.recipe_path).recipe, stage)


def _has_begun(folder: StageFolder) -> bool:
    return folder.metrics_path.is_file() or folder.eval_path.is_file()
