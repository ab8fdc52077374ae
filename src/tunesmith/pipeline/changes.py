"""What a run began with and what is asked of it now: recipe, rows, base, template, versions of packages.

In: a run folder, the recipe and the prepared rows. Out: what may go on, told and recorded in the manifest; else one
ResumeError (exit 3) with every difference, and nothing written. Must not know: training.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from glob import glob
from pathlib import Path

from tunesmith.data.ledger import read_parquet
from tunesmith.data.prepare import Prepared, tokenizer_sha
from tunesmith.data.row_changes import row_changes
from tunesmith.data.store import digest_of
from tunesmith.errors import ResumeError, RunFolderError
from tunesmith.model.load import model_folder
from tunesmith.model.policy import Weights
from tunesmith.model.results import read_result
from tunesmith.pipeline.prepare import PreparedRun
from tunesmith.pipeline.starts import file_shas, weights_sha_on_disk
from tunesmith.recipe.diff import Change, diff_recipes
from tunesmith.recipe.load import LoadedRecipe, load_recipe
from tunesmith.recipe.models import Recipe, Stage
from tunesmith.runs.atomic import TEMPORARY, fsync_path
from tunesmith.runs.disk import disk_errors
from tunesmith.runs.folder import RunFolder, package_versions

MAX_SHOWN = 20
"""Changed fields that a refusal shows; another stage in the list changes all of its fields."""
HISTORY = "changes"
"""Key of the manifest: a list of what has changed since the run began, and was allowed."""

Entry = dict[str, object]


@dataclass(frozen=True, slots=True)
class RowsOf:
    """The rows that a stage's result goes by: hashes of its training, held-out and replay rows, and of all rows that
    it was trained on before they changed, oldest first."""

    digests: tuple[str, ...]
    before: tuple[str, ...] = ()


@dataclass(slots=True)
class Going:
    """What a start of the run found: each stage's rows, what the manifest is to say of it, and lines to print."""

    rows: dict[str, RowsOf] = field(default_factory=dict)
    entries: dict[str, Entry] = field(default_factory=dict)  # of the manifest's `rows`, by stage
    history: list[Entry] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    @property
    def rows_changed(self) -> bool:
        """Whether changed rows were accepted at this start."""
        return any(entry["kind"] == "rows" for entry in self.history)


def recipe_changes(loaded: LoadedRecipe) -> list[Change]:
    """The safe changes since the run began. ResumeError with the others: the folder would become two runs in one."""
    recipe = loaded.recipe
    run = RunFolder(Path(recipe.runs_folder) / recipe.name)
    if not run.recipe_path.is_file():
        return []
    changes = diff_recipes(load_recipe(run.recipe_path).recipe, recipe)
    unsafe = [change for change in changes if not change.safe]
    if not unsafe:
        return changes
    lines = [f"  {change}" for change in unsafe[:MAX_SHOWN]]
    if len(unsafe) > MAX_SHOWN:
        lines.append(f"  and {len(unsafe) - MAX_SHOWN} more")
    lines += [f"  {change} (this one alone would be safe: {change.why})" for change in changes if change.safe]
    remedy = "Give this run another `name`, or undo the changes; nothing was overwritten."
    kept = _finished_before(run, recipe, unsafe)
    if kept:
        remedy += f" A run of another name in this folder copies what is finished and unchanged: {', '.join(kept)}."
    what = "the run folder belongs to another recipe:\n" + "\n".join(lines)
    raise ResumeError(what, where=str(run.path), remedy=remedy)


def _finished_before(run: RunFolder, recipe: Recipe, unsafe: list[Change]) -> list[str]:
    """Finished stages in front of the first one that changed; none where something above the stages did."""
    numbers = [change.stage_number for change in unsafe if change.path != "name"]
    first = min((number for number in numbers if number is not None), default=len(recipe.stages))
    if None in numbers:
        return []
    return [stage.name for stage in recipe.stages[:first] if run.stage(stage.name).result_path.is_file()]


def account_of(loaded: LoadedRecipe, prepared: PreparedRun) -> Entry:
    """What the run is made from, by hash: base, template, tokenizer and sources. `loaded` is the pinned recipe."""
    model = loaded.recipe.model
    return {
        "recipe": loaded.source,
        "base_sha256": weights_sha_on_disk(Weights(model)),
        "base_files": file_shas(model_folder(model)),
        "template": prepared.renderer.template.name,
        "template_sha256": prepared.renderer.template.sha,
        "tokenizer_sha256": tokenizer_sha(prepared.renderer.tokenizer),
        "stop_ids": list(prepared.renderer.stop_ids),
        "sources": {name: dict(stage.sources) for name, stage in prepared.stages.items()},
        "revisions": {name: dict(stage.revisions) for name, stage in prepared.stages.items()},
    }


def check_inputs(
    run: RunFolder,
    recipe: Recipe,
    prepared: PreparedRun,
    account: Mapping[str, object],
    *,
    accept_rows: bool,
    safe: list[Change],
) -> Going:
    """What a start may go on with. ResumeError where a stage that has begun was made from something else."""
    manifest = run.read_manifest()
    going = Going()
    refused = _base_changes(run, recipe, manifest, account)
    for stage in recipe.stages:
        refused += _stage_rows(run, stage, prepared.stages[stage.name], manifest, going, accept=accept_rows)
    if refused:
        remedy = "Give this run another `name`, or bring back what it began with; nothing was overwritten."
        if all(line.startswith("rows of") for line in refused):
            remedy += " With --accept-data-change the run goes on with the new rows, and records it."
        what = "what the run is made from has changed since it began:\n" + "\n".join(f"  {line}" for line in refused)
        raise ResumeError(what, where=str(run.path), remedy=remedy)
    if safe:
        fields = [{"path": change.path, "old": change.old, "new": change.new, "why": change.why} for change in safe]
        going.history.append({"kind": "recipe", "fields": fields})
        going.lines += [f"recipe: {change}: goes on, because {change.why}" for change in safe]
    _versions(manifest, going)
    return going


def record(run: RunFolder, account: Mapping[str, object], going: Going) -> None:
    """Write into the manifest what this start found. A ledger of rows that changed is kept beside the new one."""
    history = _history(run.read_manifest())
    now = datetime.now(UTC).isoformat(timespec="seconds")
    new = [{"utc": now, **entry} for entry in going.history]
    if going.rows_changed and run.ledger_path.is_file():
        kept = run.path / f"ledger-before-{sum(entry.get('kind') == 'rows' for entry in history) + 1}.parquet"
        _copy(run.ledger_path, kept)
        new = [entry | {"ledger_before": kept.name} if entry["kind"] == "rows" else entry for entry in new]
    values = {**account, "rows": going.entries}
    if history or new:
        values[HISTORY] = [*history, *new]
    run.update_manifest(values)


def refuse_gone_sources(recipe: Recipe, manifest: Mapping[str, object]) -> None:
    """ResumeError where a file that a stage has begun on is not there any more: its rows cannot even be compared."""
    run = RunFolder(Path(recipe.runs_folder) / recipe.name)
    for stage in recipe.stages:
        known, on_hub = (_of_stage(manifest, key, stage.name) for key in ("sources", "revisions"))
        paths = [source.path for source in (*stage.train, *stage.heldout)]
        gone = [path for path in paths if path in known and path not in on_hub and not _is_there(path)]
        if gone and run.stage(stage.name).has_begun():
            rows = _of_stage(manifest, "rows", stage.name)
            raise ResumeError(
                f"is gone, and stage {stage.name} has begun on it ({rows.get('train')} training rows then)",
                where=gone[0],
                remedy="Bring it back, or give the run another `name` and other rows; nothing was overwritten.",
            )


def _of_stage(manifest: Mapping[str, object], key: str, stage: str) -> Entry:
    """What the manifest says under `key` of one stage; empty where it says nothing."""
    entries = manifest.get(key)
    entry = entries.get(stage) if isinstance(entries, dict) else None
    return entry if isinstance(entry, dict) else {}


def _is_there(path: str) -> bool:
    return path.startswith("embedded:") or Path(path).expanduser().exists() or bool(glob(path, recursive=True))  # noqa: PTH207


def _base_changes(
    run: RunFolder, recipe: Recipe, manifest: Mapping[str, object], account: Mapping[str, object]
) -> list[str]:
    """Base, template and tokenizer that are not those of the stages that have begun, each in one line."""
    if not any(run.stage(stage.name).has_begun() for stage in recipe.stages):
        return []
    names = {"base_sha256": "base", "template_sha256": "chat template", "tokenizer_sha256": "tokenizer"}
    found = []
    for key, name in names.items():
        was, now = manifest.get(key), account[key]
        if was is not None and was != now:
            detail = _changed_files(manifest.get("base_files"), account["base_files"]) if key == "base_sha256" else ""
            found.append(f"{name}: {detail or f'sha256 {str(was)[:16]} -> {str(now)[:16]}'}")
    return found


def _changed_files(was: object, now: object) -> str:
    """Which files of the base differ; empty where the manifest is of a release that did not name them."""
    if not isinstance(was, dict) or not isinstance(now, dict):
        return ""
    words = [f"{name} is gone" for name in was if name not in now]
    words += [f"{name} was added" for name in now if name not in was]
    return ", ".join([*(f"{name} was altered" for name in was if name in now and now[name] != was[name]), *words])


def _stage_rows(
    run: RunFolder, stage: Stage, prepared: Prepared, manifest: Mapping[str, object], going: Going, *, accept: bool
) -> list[str]:
    """Decide what rows a stage goes by; the lines that refuse it, where it may not go on."""
    now = _rows_entry(prepared)
    digests = _texts(now["digests"])
    was = _of_stage(manifest, "rows", stage.name)
    if not was or not run.stage(stage.name).has_begun():
        going.rows[stage.name], going.entries[stage.name] = RowsOf(digests), now
        return []
    before = _texts(was.get("before"))
    if was.get("sha256") == now["sha256"]:
        going.rows[stage.name] = RowsOf(digests, before)
        going.entries[stage.name] = now | ({"before": list(before)} if before else {})
        return []
    finished = _is_finished(run, stage)
    accepted = finished and any(
        (entry.get("kind"), entry.get("stage"), entry.get("sha256")) == ("rows", stage.name, now["sha256"])
        for entry in _history(manifest)
    )
    told = _described(run, stage, prepared, was, now)
    if not (accept or accepted):
        return [f"rows of stage {stage.name}: {told}"]
    if finished:
        going.rows[stage.name], going.entries[stage.name] = RowsOf(_texts(was.get("digests")), before), was
        kept = "it is finished and stays as it is"
    else:
        before = (*before, str(was.get("sha256")))
        going.rows[stage.name], going.entries[stage.name] = RowsOf(digests, before), now | {"before": list(before)}
        kept = "it goes on from its checkpoint, and the epoch begins again with them"
    if not accepted:
        going.history.append(
            {"kind": "rows", "stage": stage.name, "sha256": now["sha256"], "before": was, "what": told, "then": kept}
        )
    going.lines.append(f"rows of stage {stage.name}: {told}; accepted: {kept}")
    return []


def _is_finished(run: RunFolder, stage: Stage) -> bool:
    """Whether the stage has all the steps that the recipe asks for now."""
    try:
        result = read_result(run, stage.name)
    except RunFolderError:
        return False
    return (result.epochs, result.max_steps) == (stage.epochs, stage.max_steps)


def _described(run: RunFolder, stage: Stage, prepared: Prepared, was: Entry, now: Entry) -> str:
    """What differs, from the run's ledger; from the manifest's counts where that cannot be read."""
    sides = ("train", "heldout", "replay")
    counts = ", ".join(f"{side} {was.get(side)} -> {now[side]}" for side in sides if was.get(side) != now[side])
    try:
        changes = row_changes(read_parquet(run.ledger_path), prepared.ledger, stage=stage.name)
    except (OSError, ValueError, KeyError) as problem:
        return f"{counts or 'equally many'} (the run's ledger cannot be read: {problem})"
    return f"{changes}{f' ({counts})' if counts else ''}"


def _versions(manifest: Mapping[str, object], going: Going) -> None:
    """Say and record packages that are of another version than at the last start."""
    then = manifest.get("packages")
    if not isinstance(then, dict):
        return
    for entry in _history(manifest):
        then = then | _now_of(entry.get("packages"))
    now = package_versions()
    changed = {name: [then.get(name), now.get(name)] for name in {**then, **now} if then.get(name) != now.get(name)}
    if changed:
        told = ", ".join(f"{name} {was or 'absent'} -> {is_ or 'absent'}" for name, (was, is_) in changed.items())
        going.history.append({"kind": "packages", "packages": changed})
        going.lines.append(
            f"versions: {told} since the last start; a stage that goes on can differ in rounding from an unbroken one"
        )


def _now_of(packages: object) -> Entry:
    if not isinstance(packages, dict):
        return {}
    return {name: pair[1] for name, pair in packages.items() if isinstance(pair, list) and len(pair) == 2}


def _rows_entry(prepared: Prepared) -> Entry:
    """What the manifest says of a stage's rows: how many a side, each side's hash, and one of all."""
    sides = {"train": prepared.train, "heldout": prepared.heldout, "replay": prepared.replay}
    digests = [digest_of(trees) for trees in sides.values()]
    sha = hashlib.sha256("".join(digests).encode()).hexdigest()
    return {**{name: len(trees) for name, trees in sides.items()}, "sha256": sha, "digests": digests}


def _texts(value: object) -> tuple[str, ...]:
    return tuple(str(item) for item in value) if isinstance(value, list | tuple) else ()


def _history(manifest: Mapping[str, object]) -> list[Entry]:
    entries = manifest.get(HISTORY)
    return [dict(entry) for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []


def _copy(source: Path, target: Path) -> None:
    temporary = target.with_name(f"{TEMPORARY}{target.name}")
    with disk_errors(target):
        shutil.copyfile(source, temporary)
        fsync_path(temporary)
        temporary.replace(target)
        fsync_path(target.parent)
