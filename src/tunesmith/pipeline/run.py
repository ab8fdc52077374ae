"""A run: a recipe's stages in order, in one folder, resumable by the same call.

In: a loaded recipe. Out: the run folder. Must not know: the command line.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from tunesmith.data.ledger import write_ledgers
from tunesmith.errors import RecipeError
from tunesmith.model.machine import Machine
from tunesmith.pipeline.changes import Going, account_of, check_inputs, recipe_changes, record, refuse_gone_sources
from tunesmith.pipeline.check import CheckReport, data_lines, template_lines
from tunesmith.pipeline.disk import refuse_small_disk
from tunesmith.pipeline.logged import Logged
from tunesmith.pipeline.options import RunOptions
from tunesmith.pipeline.pins import pin_entry, pinned
from tunesmith.pipeline.prepare import PreparedRun, prepare_run
from tunesmith.pipeline.probes import retained_rows
from tunesmith.pipeline.resumed import settle_threads
from tunesmith.pipeline.reuse import reuse_stage, reused_lines
from tunesmith.pipeline.stage import StageJob, run_stage
from tunesmith.pipeline.starts import start_weights
from tunesmith.recipe.explain import dump_resolved
from tunesmith.recipe.load import LoadedRecipe
from tunesmith.recipe.models import Recipe, duration_seconds
from tunesmith.runs.atomic import write_text
from tunesmith.runs.folder import RunFolder, create_or_open
from tunesmith.runs.lock import RunLock, run_lock
from tunesmith.runs.stop import StopRequest, stop_requests
from tunesmith.train.progress import Observer, observer_for


def run_recipe(loaded: LoadedRecipe, *, observer: Observer | None = None, options: RunOptions | None = None) -> Path:
    """Run every stage of a recipe, or go on where an earlier call stopped; returns the run folder.

    Raises the errors of `tunesmith.errors`; nothing that exists is overwritten by another recipe.
    """
    recipe, allowed = loaded.recipe, options or RunOptions()
    watcher = Logged(observer or observer_for())
    folder = RunFolder(Path(recipe.runs_folder) / recipe.name)
    stopping = stop_requests(
        within=duration_seconds(recipe.stop_within),
        before=None if recipe.save_before is None else duration_seconds(recipe.save_before),
        owns_process=allowed.owns_process,
    )
    with stopping as stop, run_lock(folder.lock_path, tell=watcher.noted, only_if_there=True) as lock:
        return _run(loaded, watcher, allowed, stop, lock)


def _run(loaded: LoadedRecipe, watcher: Logged, allowed: RunOptions, stop: StopRequest, lock: RunLock) -> Path:
    asked, manifest = loaded, RunFolder(Path(loaded.recipe.runs_folder) / loaded.recipe.name).read_manifest()
    loaded = pinned(loaded, manifest)
    recipe = loaded.recipe
    machine = Machine.detect(recipe.threads)
    if machine.world_size > 1:
        raise RecipeError(
            "runs on several processes are not there yet",
            where=f"torchrun with {machine.world_size} processes",
            remedy="Start one process: `tunesmith run RECIPE`.",
        )
    recipe_changes(loaded)  # it may refuse, before rows are read
    if not allowed.accept_data_change:
        refuse_gone_sources(recipe, manifest)
    # Before the folder is made: bad data leaves nothing behind.
    between = partial(stop.raise_if_requested, "data", "what was prepared so far is kept")
    prepared = prepare_run(recipe, watcher.noted, revisions=_revisions(recipe), between=between)
    between()
    refuse_small_disk(recipe, machine)
    checked = CheckReport()
    data_lines(checked, prepared)
    template_lines(checked, prepared.renderer)
    lock.take()
    stop.require(lock.check)
    run = create_or_open(recipe.runs_folder, recipe.name)
    with watcher.writing(run.path):
        account = account_of(loaded, prepared) | pin_entry(asked, loaded, run.read_manifest())
        going = _begin(run, loaded, prepared, account, accept_rows=allowed.accept_data_change)
        for text in (*going.lines, *(f"{line.subject}: {line.text}" for line in checked.lines)):
            watcher.noted(text)
        for index, stage in enumerate(recipe.stages):
            settle_threads(run, stage.name, asked=recipe.threads, tell=watcher.noted)
            job = StageJob(
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
                rows=going.rows[stage.name],
                retained=retained_rows(recipe, index, prepared.stages),
                stop=stop,
            )
            copied = reuse_stage(job)
            _write_recipe(run, loaded)  # it says what was copied
            if not copied:
                run_stage(job)
    return run.path


def _begin(
    run: RunFolder, loaded: LoadedRecipe, prepared: PreparedRun, account: dict[str, object], *, accept_rows: bool
) -> Going:
    """Refuse what may not go on, and write what the run is made from; what was found on the way."""
    safe = recipe_changes(loaded)
    going = check_inputs(run, loaded.recipe, prepared, account, accept_rows=accept_rows, safe=safe)
    record(run, account, going)  # before the ledger: what was accepted stays so, whatever comes
    _write_recipe(run, loaded)
    write_ledgers(run.ledger_path, prepared.ledgers())
    return going


def _revisions(recipe: Recipe) -> dict[str, dict[str, str]]:
    """The commits of hub data sets that the run has begun on: it goes on with them, wherever `main` has moved."""
    found = RunFolder(Path(recipe.runs_folder) / recipe.name).read_manifest().get("revisions")
    return found if isinstance(found, dict) else {}


def _write_recipe(run: RunFolder, loaded: LoadedRecipe) -> None:
    """The resolved recipe, and of each stage that was copied from where."""
    text = dump_resolved(loaded) + "".join(reused_lines(run))
    if not run.recipe_path.is_file() or run.recipe_path.read_text("utf-8") != text:
        write_text(run.recipe_path, text)
