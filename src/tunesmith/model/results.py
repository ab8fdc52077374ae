"""What a stage made, and how to find it again: result.json in the stage's folder.

In: a run folder and a stage's name. Out: where its weights lie. Must not know: training, torch.

Paths inside the run are kept relative to it, so a run folder can be moved. The result names every file of its weights
with size and sha256, and its own content by hash: whoever reads a stage reads what was trained, or is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tunesmith.errors import ResumeError, RunFolderError
from tunesmith.model.policy import Weights
from tunesmith.model.trust import require_pinned
from tunesmith.recipe.load import load_recipe
from tunesmith.recipe.models import Model, Recipe
from tunesmith.runs.atomic import write_json
from tunesmith.runs.folder import RunFolder, open_run
from tunesmith.runs.inventory import Inventory, digest, find_change, read_inventory, read_object, take_inventory

BASE = "base"

_AGAIN = (
    "Restore it from a copy, or delete the stage's result.json: `tunesmith run` makes the result again from the "
    "stage's last checkpoint."
)


@dataclass(frozen=True, slots=True)
class StageResult:
    """A finished stage: its weights, its length, and the ids at which its answers end.

    files: what its weights' folder held when they were written; None of results that were made before it was kept.
    """

    stage: str
    method: str
    weights: Weights
    num_steps: int
    stop_ids: tuple[int, ...]
    inputs_sha: str
    epochs: int
    max_steps: int | None
    files: Inventory | None = None


def _inside(run: RunFolder, path: str) -> str:
    """`path` relative to the run where it lies in it."""
    resolved = Path(path).resolve()
    return str(resolved.relative_to(run.path.resolve())) if resolved.is_relative_to(run.path.resolve()) else path


def write_result(run: RunFolder, result: StageResult, *, weights_sha: str, template_sha: str) -> None:
    """Write result.json, the last file of a stage: it is there only when everything else is."""
    full, adapter = result.weights.full, result.weights.adapter
    in_run = _inside(run, full.path) != full.path
    content: dict[str, object] = {
        "stage": result.stage,
        "method": result.method,
        "kind": "model" if adapter is None else "adapter",
        "full": {**full.model_dump(), "path": _inside(run, full.path)},
        "full_in_run": in_run,
        "adapter": None if adapter is None else _inside(run, str(adapter)),
        "num_steps": result.num_steps,
        "epochs": result.epochs,
        "max_steps": result.max_steps,
        "stop_ids": list(result.stop_ids),
        "inputs_sha256": result.inputs_sha,
        "weights_sha256": weights_sha,
        "template_sha256": template_sha,
        "files": take_inventory(_folder_of(result.weights)),
    }
    write_json(run.stage(result.stage).result_path, content | {"sha256": digest(content)})


def _folder_of(weights: Weights) -> Path:
    """Where a stage put what it trained."""
    return Path(weights.full.path) if weights.adapter is None else weights.adapter


def read_result(run: RunFolder, stage: str) -> StageResult:
    """The result of a finished stage, whose files are as they were written.

    Raises RunFolderError where it is not finished, and ResumeError (3), naming the file, where a file of it was
    altered, removed or added: it is not what was trained.
    """
    path = run.stage(stage).result_path
    try:
        result = _parsed(run, read_object(path))
    except FileNotFoundError as problem:
        finished = [name for name in run.stage_names() if run.stage(name).result_path.is_file()]
        remedy = f"Finished stages: {', '.join(finished) or 'none'}. `tunesmith run` goes on where the run stopped."
        raise RunFolderError(f"the stage {stage!r} has no result", where=str(run.path), remedy=remedy) from problem
    except (ValueError, KeyError, TypeError, OverflowError, OSError) as problem:
        raise ResumeError(f"cannot be read: {problem}.", where=str(path), remedy=_AGAIN) from problem
    if result.stage != stage:
        raise ResumeError(f"is of the stage {result.stage!r}.", where=str(path), remedy=_AGAIN)
    folder = _folder_of(result.weights)
    problem_there = "" if result.files is None else find_change(folder, result.files, beside=frozenset())
    if problem_there:
        raise ResumeError(f"{problem_there}.", where=str(folder), remedy=_AGAIN)
    before = _stage_of_model(run, result.weights)
    if before not in (None, stage):
        assert before is not None
        read_result(run, before)
    return result


def _parsed(run: RunFolder, content: dict[str, Any]) -> StageResult:
    """The result that result.json holds. Raises KeyError, TypeError or ValueError where it is none of ours."""
    told = content.pop("sha256", None)
    if (told is None) == ("files" in content) or told not in (None, digest(content)):
        raise ValueError("it was altered: its sha256 is not the one that was written")
    full = Model.model_validate(content["full"])
    if content["full_in_run"]:
        full = full.model_copy(update={"path": str(run.path / full.path)})
    adapter = content["adapter"]
    return StageResult(
        str(content["stage"]),
        str(content["method"]),
        Weights(full, None if adapter is None else run.path / adapter),
        int(content["num_steps"]),
        tuple(int(number) for number in content["stop_ids"]),
        str(content["inputs_sha256"]),
        int(content["epochs"]),
        None if content["max_steps"] is None else int(content["max_steps"]),
        None if told is None else read_inventory(content["files"]),
    )


def _stage_of_model(run: RunFolder, weights: Weights) -> str | None:
    """The stage of this run that trained the full weights; None where they are of somewhere else."""
    names = [name for name in run.stage_names() if run.stage(name).model_path == Path(weights.full.path)]
    return names[0] if names else None


def run_recipe_of(run: RunFolder) -> Recipe:
    """The resolved recipe that lies in the run. Raises ModelError where its code is to be run and nobody read it."""
    recipe = load_recipe(run.recipe_path).recipe
    pin = run.read_manifest().get("model_revision")
    if isinstance(pin, dict) and pin.get("asked") != pin.get("commit"):
        # the run found that commit by itself: no person has looked at it
        require_pinned(recipe.model.model_copy(update={"revision": None}))
    return recipe


def stage_weights(run: RunFolder, stage: str | None, *, scores: bool = False) -> tuple[str, Weights]:
    """Name and weights of a stage: `base`, a stage's name, or None for the last finished one that answers prompts.

    `scores`: a reward model's instead. Raises RunFolderError where there is no such stage, or it is of the other kind.
    """
    recipe = run_recipe_of(run)
    if stage == BASE and not scores:
        return BASE, Weights(recipe.model)
    fitting = [each.name for each in recipe.stages if each.makes_policy != scores]
    if stage is None:
        finished = [name for name in fitting if run.stage(name).result_path.is_file()]
        stage = next(reversed(finished or fitting), None)
    if stage not in fitting:
        raise _no_such_stage(run, recipe, stage, fitting, scores=scores)
    return stage, read_result(run, stage).weights


def _no_such_stage(
    run: RunFolder, recipe: Recipe, stage: str | None, fitting: list[str], *, scores: bool
) -> RunFolderError:
    there = stage in {BASE, *(each.name for each in recipe.stages)}
    if scores:
        what = f"the stage {stage!r} is no reward model" if there else f"there is no reward model {stage or ''!r}"
        what = "the run has no reward model" if stage is None or not fitting else what
        remedy = f"Name one of: {', '.join(fitting)}." if fitting else "Train one: a stage with `method: reward`."
        return RunFolderError(what, where=str(run.path), remedy=remedy)
    if there or stage is None:
        what = f"the stage {stage!r} is a reward model: it scores answers and writes none"
        what = (
            what if stage is not None else "the run has nothing but reward models, which score answers and write none"
        )
        remedy = f"Score a file with it (`tunesmith score`), or name one of: {', '.join([BASE, *fitting])}."
    else:
        what, remedy = f"there is no stage {stage!r}", f"The run has: {', '.join([BASE, *fitting])}."
    return RunFolderError(what, where=str(run.path), remedy=remedy)


def weights_at(text: str, *, chat_template: str | None, scores: bool = False) -> Weights | None:
    """Weights named by a path: `runs/x`, `runs/x:sft`, a model folder; None for an adapter folder or none of these.

    `scores`: they are for a reward model, which may go on from another one that is named by its stage.

    They are read with the tokens that `chat_template` needs: the one of the recipe that asks, which renders the rows.
    An adapter folder alone does not say which base it belongs to in a way that can be trusted: the caller knows.
    """
    path, _, stage = text.partition(":")
    if (Path(path) / "manifest.json").is_file() and (Path(path) / "recipe.yaml").is_file():
        run = open_run(path)
        named = {each.name: each for each in run_recipe_of(run).stages}.get(stage)
        _, found = stage_weights(run, stage or None, scores=scores and named is not None and not named.makes_policy)
        return replace(found, full=found.full.model_copy(update={"chat_template": chat_template}))
    if (Path(text) / "config.json").is_file():
        return Weights(Model(path=text, chat_template=chat_template))
    return None
