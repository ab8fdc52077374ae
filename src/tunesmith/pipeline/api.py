"""The calls that a notebook makes: each does what the command of its name does.

In: recipes as paths, names or mappings; runs as paths. Out: run folders, reports, loaded stages.
Must not know: the command line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tunesmith.comparison.run import compare_run
from tunesmith.data.types import Message
from tunesmith.export.merge import merge_run
from tunesmith.model.stage import LoadedStage, load_stage
from tunesmith.pipeline.check import CheckReport, check_recipe
from tunesmith.pipeline.run import run_recipe
from tunesmith.recipe.load import LoadedRecipe, load_named, parse_recipe
from tunesmith.recipe.models import Recipe
from tunesmith.sample.generate import generate as sample

AnyRecipe = str | Path | Mapping[str, object] | Recipe


def _loaded(recipe: AnyRecipe, overrides: tuple[str, ...]) -> LoadedRecipe:
    if isinstance(recipe, str | Path):
        return load_named(str(recipe), overrides)
    return parse_recipe(recipe, overrides)


def run(recipe: AnyRecipe, *overrides: str) -> Path:
    """Run a recipe: a file, a shipped recipe's name, a mapping, or a Recipe; `overrides` as on the command line.

    Returns the run folder. The same call resumes.
    """
    return run_recipe(_loaded(recipe, overrides))


def check(recipe: AnyRecipe, *overrides: str) -> CheckReport:
    """Check everything that can be known before training; `.ok` says whether a run would start."""
    return check_recipe(_loaded(recipe, overrides))


def compare(run: str | Path) -> Path:
    """Measure every stage of a run side by side; returns the path of report.html."""
    return compare_run(Path(run))


def load(run: str | Path, stage: str | None = None) -> LoadedStage:
    """Load a stage of a run (`base`, a name, or the last finished one) for generation."""
    return load_stage(Path(run), stage)


def generate(
    stage: LoadedStage,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 256,
    temperature: float | None = None,
    seed: int = 0,
) -> list[str]:
    """One answer a prompt, each asked as a user's turn; greedy unless a temperature is given."""
    ids = [stage.renderer.prompt_ids((Message("user", prompt),)) for prompt in prompts]
    answers = sample(
        stage.model,
        ids,
        max_new_tokens=max_new_tokens,
        stop_ids=stage.stop_ids,
        temperature=temperature,
        seed=seed,
    )
    return [str(stage.tokenizer.decode(list(answer.ids))).strip() for answer in answers]


def merge(run: str | Path, stage: str | None = None, to: str | Path | None = None) -> Path:
    """Write the merged model of a stage, verified by its logits; returns its folder."""
    return merge_run(Path(run), stage, None if to is None else Path(to))
