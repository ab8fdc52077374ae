"""Compare the stages of a run: base, SFT, SFT + DPO side by side, with intervals and a verdict.

In: a run folder whose stages are done. Out: compare/summary.json, compare/answers.jsonl and report.html in it.
Must not know: training, the command line.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from tunesmith.comparison.collect import collect
from tunesmith.comparison.report import write_report
from tunesmith.comparison.rows import Rows, compared_rows
from tunesmith.comparison.summary import answered, as_json, summarize
from tunesmith.comparison.table import print_summary
from tunesmith.data.render import Renderer
from tunesmith.data.template import choose_template
from tunesmith.errors import ModelError, RunFolderError
from tunesmith.model.machine import Machine
from tunesmith.model.policy import Weights, policy_for_reading
from tunesmith.model.results import BASE, weights_at
from tunesmith.model.stage import LoadedStage, load_stage
from tunesmith.recipe.load import load_recipe
from tunesmith.recipe.models import Recipe
from tunesmith.recipe.order import previous_policy
from tunesmith.recipe.preferences import PreferenceStage
from tunesmith.runs.atomic import make_folder, write_json, write_text
from tunesmith.runs.disk import disk_errors
from tunesmith.runs.folder import RunFolder, open_run


def compare_run(
    run: Path, *, console: Console | None = None, load: Callable[[Path, str | None], LoadedStage] = load_stage
) -> Path:
    """Measure the base and every finished stage of `run`; returns the path of report.html.

    Raises RunFolderError where no stage is finished. Figures that cannot be computed are null, with a reason.
    """
    console = console or Console()
    folder = open_run(run)
    recipe = load_recipe(folder.recipe_path).recipe
    names, notes = stage_names(folder, recipe)
    reference = reference_name(recipe)
    if reference not in names and reference not in {stage.name for stage in recipe.stages}:
        names.insert(1, reference)  # where the preference stage started from, outside of this run

    def rows_of(stage: LoadedStage) -> Rows:
        positions = stage.model.config.get_text_config().to_dict().get("max_position_embeddings")
        return compared_rows(
            recipe,
            stage.renderer,
            max_new_tokens=recipe.compare.max_new_tokens,
            max_positions=positions if isinstance(positions, int) else None,
        )

    inside = {BASE, *(stage.name for stage in recipe.stages)}
    records, rows = collect(
        names,
        reference if reference in names else None,
        load=lambda name: load(folder.path, name) if name in inside else load_start(name, recipe),
        rows_of=rows_of,
        compare=recipe.compare,
        seed=recipe.seed,
        say=lambda line: console.print(line, style="dim", markup=False, highlight=False),
    )
    summary = summarize(recipe, records, rows, reference=reference, notes=notes)
    answers = answered(recipe.compare, records, rows)
    with disk_errors(folder.summary_path):
        make_folder(folder.summary_path.parent)
    lines = "".join(json.dumps(asdict(line), ensure_ascii=False) + "\n" for line in answers)
    write_text(folder.summary_path.with_name("answers.jsonl"), lines)
    write_json(folder.summary_path, as_json(summary))
    write_report(folder, recipe, summary, answers)
    print_summary(summary, console)
    return folder.report_path


def stage_names(folder: RunFolder, recipe: Recipe) -> tuple[list[str], list[str]]:
    """`base` and the finished stages in the recipe's order, and a note on each that is not finished."""
    policies = [stage.name for stage in recipe.stages if stage.makes_policy]
    finished = [name for name in policies if folder.stage(name).result_path.is_file()]
    if not policies:
        what = "the run has nothing but reward models, which write no answers that could be compared."
        remedy = "Their accuracy and calibration are in eval.jsonl; `tunesmith score RUN FILE` scores a file."
        raise RunFolderError(what, where=str(folder.path), remedy=remedy)
    if not finished:
        remedy = "Finish it first: `tunesmith run RECIPE` goes on where it stopped."
        raise RunFolderError("no stage of the run is finished.", where=str(folder.path), remedy=remedy)
    notes = [f"Stage {name!r} is not finished and was left out." for name in policies if name not in finished]
    return [BASE, *finished], notes


def reference_name(recipe: Recipe) -> str:
    """The stage that figures are taken against: the policy that the last preference stage started from.

    Without a preference stage it is the base; where the stage starts outside of the run, what its `start` says.
    """
    numbers = [
        number
        for number, stage in enumerate(recipe.stages)
        if isinstance(stage, PreferenceStage) and stage.makes_policy
    ]
    if not numbers:
        return BASE
    number = numbers[-1]
    start = recipe.stages[number].start
    if start == "previous":
        before = previous_policy(recipe.stages, number)
        return BASE if before is None else recipe.stages[before].name
    return start


def load_start(start: str, recipe: Recipe) -> LoadedStage:
    """The adapter, model or run that a stage started from, rendered as in this run."""
    is_adapter = (Path(start) / "adapter_config.json").is_file()
    here = Weights(recipe.model, Path(start)) if is_adapter else None
    weights = here or weights_at(start, chat_template=recipe.model.chat_template)
    if weights is None:
        remedy = "It was there when the run started; put it back, or compare the run on that machine."
        raise ModelError("the adapter, model or run that a stage started from is gone.", where=start, remedy=remedy)
    policy = policy_for_reading(weights, device=Machine.detect(recipe.threads).device)
    template = choose_template(policy.tokenizer, recipe.model.chat_template)
    renderer = Renderer(policy.tokenizer, template, max(stage.max_length for stage in recipe.stages))
    return LoadedStage(start, policy, renderer, renderer.stop_ids)
