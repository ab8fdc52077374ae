"""Stages that another run has finished with equal inputs: copied, not trained again.

In: a stage that is about to run, and the run folders beside its own. Out: its weights and records in this run, with
their bytes checked, or nothing. Must not know: training.

Equal inputs are an equal hash of settings, seed, start weights, template, rows and engine, an equal length, and a
recipe there that differs in nothing that could move a weight beyond rounding. What is copied is compared with the
hashes that were written when it was made, so a result that changes under the copy is not taken.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from tunesmith.errors import ResourceError, TunesmithError
from tunesmith.model.results import StageResult, read_result
from tunesmith.pipeline.stage import StageJob, finish_stage, inputs_sha, is_finished
from tunesmith.recipe.load import load_recipe
from tunesmith.recipe.models import Stage
from tunesmith.runs.atomic import publish_folder, write_bytes
from tunesmith.runs.folder import RunFolder
from tunesmith.runs.inventory import find_change, read_object

RECORDS = ("metrics.jsonl", "timings.jsonl", "eval.jsonl", "warnings.jsonl", "budget.jsonl", "memory.json")
KEY = "reused"
"""Of the manifest: by stage, the run that it was copied from."""
_FREE = {"save_every", "keep_checkpoints", "forest_tokens", "gradient_checkpointing", "offload_activations"}


class _Unfit(Exception):
    """What was copied is not what the other run made."""


def reuse_stage(job: StageJob) -> bool:
    """Copy the stage from a run beside this one that has finished it with equal inputs; whether there was one."""
    folder = job.run.stage(job.stage.name)
    if folder.has_begun():
        if job.stage.name in _entries(job.run) and not is_finished(job, inputs_sha(job)):
            _forget(job)  # it is trained further here: not a copy any more
        return False
    if not job.options.reuse:
        return False
    inputs = inputs_sha(job)
    for run in _candidates(job, inputs):
        try:
            _take(job, run, inputs)
        except ResourceError:
            raise  # the disk is full: training would not fit either
        except (_Unfit, OSError, TunesmithError) as problem:
            job.observer.noted(
                f"stage {job.stage.name}: {run.path} has finished it with equal inputs, but {problem}; "
                "not taken from there"
            )
            continue
        job.observer.noted(
            f"stage {job.stage.name}: copied from {run.path}, which finished it with equal inputs; "
            "not trained again (--no-reuse trains it)"
        )
        return True
    return False


def reused_lines(run: RunFolder) -> list[str]:
    """Comments for recipe.yaml: which stages were copied, and from where."""
    named = {name: entry.get("run") for name, entry in _entries(run).items() if isinstance(entry, dict)}
    return [f"# stage {name}: copied from {json.dumps(str(path))}, not trained here\n" for name, path in named.items()]


def _candidates(job: StageJob, inputs: str) -> Iterator[RunFolder]:
    """Runs beside this one with a finished stage of this name and these inputs, in the alphabet's order."""
    wanted = {"inputs_sha256": inputs, "epochs": job.stage.epochs, "max_steps": job.stage.max_steps}
    for path in sorted(job.run.path.parent.glob(f"*/stages/{job.stage.name}/result.json")):
        run = RunFolder(path.parents[2])
        if run.path == job.run.path or run.path.is_symlink():
            continue
        try:
            content = read_object(path)
            if all(content.get(key) == value for key, value in wanted.items()) and _same_settings(run, job.stage):
                yield run
        except (OSError, ValueError, TunesmithError):
            continue  # of a run that cannot be read nothing is taken; whoever opens it is told


def _same_settings(run: RunFolder, stage: Stage) -> bool:
    """Whether the other run's recipe has this stage, but for what moves no weight beyond rounding."""
    theirs = {each.name: each for each in load_recipe(run.recipe_path).recipe.stages}.get(stage.name)
    if theirs is None:
        return False
    free = _FREE | ({"eval_every"} if stage.keep == theirs.keep == "final" else set())
    return theirs.model_dump(mode="json", exclude=free) == stage.model_dump(mode="json", exclude=free)


def _take(job: StageJob, run: RunFolder, inputs: str) -> None:
    """Weights first, records next, the manifest, and result.json last: a copy that was cut short is no result."""
    found = read_result(run, job.stage.name)
    adapter = found.weights.adapter
    source = adapter or Path(found.weights.full.path)
    folder = job.run.stage(job.stage.name).create()
    target = folder.adapter_path if adapter else folder.model_path
    with publish_folder(target) as temporary:
        _copy_files(source, temporary)
        _check(found, temporary)
        if adapter:
            _refuse_leaning(run, temporary)
    for name in RECORDS:
        record = run.stage(job.stage.name).path / name
        if record.is_file() and not record.is_symlink():
            write_bytes(folder.path / name, record.read_bytes())
    _remember(job, {"run": str(run.path), "inputs_sha256": inputs})
    finish_stage(job, target, is_adapter=adapter is not None, num_steps=found.num_steps, inputs=inputs)


def _copy_files(source: Path, target: Path) -> None:
    for path in sorted(source.rglob("*")):
        copied = target / path.relative_to(source)
        if path.is_symlink():
            raise _Unfit(f"{path.name} is a symbolic link")
        if path.is_dir():
            copied.mkdir()
        else:
            shutil.copyfile(path, copied)


def _check(found: StageResult, copied: Path) -> None:
    """_Unfit where the copy is not what the other run wrote, by the hashes in its result.json."""
    if found.files is None:
        raise _Unfit("it is of a release that did not keep the hashes of its files")
    problem = find_change(copied, found.files, beside=frozenset())
    if problem:
        raise _Unfit(problem)


def _refuse_leaning(run: RunFolder, adapter: Path) -> None:
    """_Unfit where the adapter names a base inside the other run: a copy would break when that run is removed."""
    base = read_object(adapter / "adapter_config.json").get("base_model_name_or_path")
    if isinstance(base, str) and Path(base).resolve().is_relative_to(run.path.resolve()):
        raise _Unfit("its adapter names a base that lies in that run")


def _entries(run: RunFolder) -> dict[str, object]:
    entries = run.read_manifest().get(KEY)
    return dict(entries) if isinstance(entries, dict) else {}


def _remember(job: StageJob, entry: dict[str, object]) -> None:
    job.run.update_manifest({KEY: {**_entries(job.run), job.stage.name: entry}})


def _forget(job: StageJob) -> None:
    entries = _entries(job.run)
    if entries.pop(job.stage.name, None) is not None:
        job.run.update_manifest({KEY: entries})
