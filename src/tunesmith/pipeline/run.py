"""A run: a recipe's stages in order, in one folder, resumable by the same call.

In: a loaded recipe. Out: the run folder. Must not know: the command line.
"""

from __future__ import annotations

from pathlib import Path

import torch

from tunesmith.errors import RecipeError, ResumeError
from tunesmith.model.machine import Machine
from tunesmith.model.policy import Weights
from tunesmith.pipeline.check import CheckReport, data_lines, template_lines
from tunesmith.pipeline.prepare import PreparedRun, prepare_run
from tunesmith.pipeline.stage import StageJob, run_stage
from tunesmith.pipeline.starts import start_weights, weights_sha_on_disk
from tunesmith.recipe.diff import diff_recipes
from tunesmith.recipe.explain import dump_resolved
from tunesmith.recipe.load import LoadedRecipe, load_recipe
from tunesmith.runs.atomic import write_text
from tunesmith.runs.folder import RunFolder, create_or_open
from tunesmith.runs.lock import run_lock
from tunesmith.train.progress import Observer, observer_for


def run_recipe(loaded: LoadedRecipe, *, observer: Observer | None = None) -> Path:
    """Run every stage of a recipe, or go on where an earlier call stopped; returns the run folder.

    Raises the errors of `tunesmith.errors`; nothing that exists is overwritten by another recipe.
    """
    recipe = loaded.recipe
    watcher = observer or observer_for()
    machine = Machine.detect(recipe.threads)
    if machine.world_size > 1:
        raise RecipeError(
            "runs on several processes are not there yet",
            where=f"torchrun with {machine.world_size} processes",
            remedy="Start one process: `tunesmith run RECIPE`.",
        )
    torch.use_deterministic_algorithms(True, warn_only=True)
    _refuse_other_recipe(loaded)
    prepared = prepare_run(recipe)  # before the folder is made: bad data leaves nothing behind
    checked = CheckReport()
    data_lines(checked, prepared)
    template_lines(checked, prepared.renderer)
    run = create_or_open(recipe.runs_folder, recipe.name)
    with run_lock(run.lock_path):
        _refuse_other_recipe(loaded)
        write_text(run.recipe_path, dump_resolved(loaded))
        _write_account(run, loaded, prepared)
        for line in checked.lines:
            watcher.noted(f"{line.subject}: {line.text}")
        for index, stage in enumerate(recipe.stages):
            run_stage(
                StageJob(
                    stage=stage,
                    prepared=prepared.stages[stage.name],
                    renderer=prepared.renderers[stage.name],
                    weights=start_weights(recipe, index, run),
                    run=run,
                    seed=recipe.seed,
                    machine=machine,
                    observer=watcher,
                )
            )
    return run.path


def _refuse_other_recipe(loaded: LoadedRecipe) -> None:
    """A run folder belongs to one recipe; only changes that leave the steps already taken as they are may go on."""
    recipe = loaded.recipe
    path = RunFolder(Path(recipe.runs_folder) / recipe.name).recipe_path
    if not path.is_file():
        return
    unsafe = [change for change in diff_recipes(load_recipe(path).recipe, recipe) if not change.safe]
    if unsafe:
        raise ResumeError(
            "the run folder belongs to another recipe:\n" + "\n".join(f"  {change}" for change in unsafe),
            where=str(path.parent),
            remedy="Give this run another `name`, or undo the changes; nothing was overwritten.",
        )


def _write_account(run: RunFolder, loaded: LoadedRecipe, prepared: PreparedRun) -> None:
    """ledger.parquet, and the hashes that say what the run was made from."""
    prepared.ledger().write_parquet(run.ledger_path)
    run.update_manifest(
        {
            "recipe": loaded.source,
            "base_sha256": weights_sha_on_disk(Weights(loaded.recipe.model)),
            "template": prepared.renderer.template.name,
            "template_sha256": prepared.renderer.template.sha,
            "stop_ids": list(prepared.renderer.stop_ids),
            "rows": {
                name: {"train": len(each.train), "heldout": len(each.heldout), "replay": len(each.replay)}
                for name, each in prepared.stages.items()
            },
        }
    )
