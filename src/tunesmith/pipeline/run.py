"""A run: a recipe's stages in order, in one folder, resumable by the same call.

In: a loaded recipe. Out: the run folder. Must not know: the command line.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from tunesmith.data.ledger import write_ledgers
from tunesmith.data.prepare import Prepared, tokenizer_sha
from tunesmith.data.store import digest_of
from tunesmith.errors import RecipeError, ResumeError
from tunesmith.model.machine import Machine
from tunesmith.model.policy import Weights
from tunesmith.pipeline.check import CheckReport, data_lines, template_lines
from tunesmith.pipeline.logged import Logged
from tunesmith.pipeline.options import RunOptions
from tunesmith.pipeline.prepare import PreparedRun, prepare_run
from tunesmith.pipeline.stage import StageJob, run_stage
from tunesmith.pipeline.starts import start_weights, weights_sha_on_disk
from tunesmith.recipe.diff import diff_recipes
from tunesmith.recipe.explain import dump_resolved
from tunesmith.recipe.load import LoadedRecipe, load_recipe
from tunesmith.recipe.models import Recipe
from tunesmith.runs.atomic import write_text
from tunesmith.runs.folder import RunFolder, create_or_open
from tunesmith.runs.lock import run_lock
from tunesmith.train.progress import Observer, observer_for


def run_recipe(loaded: LoadedRecipe, *, observer: Observer | None = None, options: RunOptions | None = None) -> Path:
    """Run every stage of a recipe, or go on where an earlier call stopped; returns the run folder.

    Raises the errors of `tunesmith.errors`; nothing that exists is overwritten by another recipe.
    """
    recipe = loaded.recipe
    watcher, allowed = Logged(observer or observer_for()), options or RunOptions()
    machine = Machine.detect(recipe.threads)
    if machine.world_size > 1:
        raise RecipeError(
            "runs on several processes are not there yet",
            where=f"torchrun with {machine.world_size} processes",
            remedy="Start one process: `tunesmith run RECIPE`.",
        )
    _refuse_other_recipe(loaded)
    # Before the folder is made: bad data leaves nothing behind.
    prepared = prepare_run(recipe, watcher.noted, revisions=_revisions(recipe))
    checked = CheckReport()
    data_lines(checked, prepared)
    template_lines(checked, prepared.renderer)
    run = create_or_open(recipe.runs_folder, recipe.name)
    with run_lock(run.lock_path), watcher.writing(run.path):
        _refuse_other_recipe(loaded)
        account = _account(loaded, prepared)
        _refuse_other_inputs(run, account)
        write_text(run.recipe_path, dump_resolved(loaded))
        write_ledgers(run.ledger_path, prepared.ledgers())
        run.update_manifest(account)
        for line in checked.lines:
            watcher.noted(f"{line.subject}: {line.text}")
        for index, stage in enumerate(recipe.stages):
            run_stage(
                StageJob(
                    stage=stage,
                    prepared=prepared.stages[stage.name],
                    renderer=prepared.renderers[stage.name],
                    weights=start_weights(recipe, index, run),
                    model=recipe.model,
                    memory=recipe.memory,
                    run=run,
                    seed=recipe.seed,
                    machine=machine,
                    observer=watcher,
                    options=allowed,
                )
            )
    return run.path


def _revisions(recipe: Recipe) -> dict[str, dict[str, str]]:
    """The commits of hub data sets that the run has begun on: it goes on with them, wherever `main` has moved."""
    found = RunFolder(Path(recipe.runs_folder) / recipe.name).read_manifest().get("revisions")
    return found if isinstance(found, dict) else {}


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


def _account(loaded: LoadedRecipe, prepared: PreparedRun) -> dict[str, object]:
    """What the run is made from, by hash: base, template, and every stage's rows."""
    return {
        "recipe": loaded.source,
        "base_sha256": weights_sha_on_disk(Weights(loaded.recipe.model)),
        "template": prepared.renderer.template.name,
        "template_sha256": prepared.renderer.template.sha,
        "tokenizer_sha256": tokenizer_sha(prepared.renderer.tokenizer),
        "stop_ids": list(prepared.renderer.stop_ids),
        "sources": {name: dict(stage.sources) for name, stage in prepared.stages.items()},
        "revisions": {name: dict(stage.revisions) for name, stage in prepared.stages.items()},
        "rows": {name: _rows(stage) for name, stage in prepared.stages.items()},
    }


def _rows(stage: Prepared) -> dict[str, object]:
    sides = {"train": stage.train, "heldout": stage.heldout, "replay": stage.replay}
    shas = [digest_of(trees) for trees in sides.values()]
    numbers: dict[str, object] = {name: len(trees) for name, trees in sides.items()}
    return numbers | {"sha256": hashlib.sha256("".join(shas).encode()).hexdigest()}


def _refuse_other_inputs(run: RunFolder, account: Mapping[str, object]) -> None:
    """A stage that has begun goes on only on the rows, base and template that it began on."""
    before = run.read_manifest()
    rows_before, rows = before.get("rows"), account["rows"]
    if not isinstance(rows_before, dict):
        return
    assert isinstance(rows, dict)
    begun = [name for name in rows if name in rows_before and run.stage(name).has_begun()]
    other = [name for name in begun if rows_before[name] != rows[name]]
    changed = [f"stage {name}: rows {rows_before[name]} -> {rows[name]}" for name in other]
    if begun:
        keys = ("base_sha256", "template_sha256")
        changed += [f"{key}: {before.get(key)} -> {account[key]}" for key in keys if before.get(key) != account[key]]
    if changed:
        raise ResumeError(
            "what the run is made from has changed since it began:\n" + "\n".join(f"  {line}" for line in changed),
            where=str(run.path),
            remedy="Give this run another `name`, or bring back what it began with; nothing was overwritten.",
        )
