"""`tunesmith calibrate`: a stage's learning rate and beta, found by short probes on a sample of its rows.

In: a recipe and one of its stages. Out: the probes, the recommended pair, what it cost; a table, a page with a plot,
and the same as JSON. Must not know: the command line.

The model is loaded once and the reference is scored once (and cached by content); between probes the trained weights
go back to the start. A probe is the stage's own training, with its schedule over fewer steps. Limits on how far the
policy may move hold for the whole stage, so a probe's are their share of it by steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tunesmith.errors import NumericsError, RecipeError
from tunesmith.pipeline.calibrate_bench import Bench, beta_of, make_bench
from tunesmith.pipeline.calibrate_page import page
from tunesmith.pipeline.calibrate_search import (
    Choice,
    Limits,
    Place,
    Probe,
    choose,
    coarse_places,
    next_places,
    probe_line,
)
from tunesmith.pipeline.run import run_recipe
from tunesmith.recipe.load import LoadedRecipe
from tunesmith.recipe.models import Recipe
from tunesmith.runs.atomic import make_folder, write_json, write_text
from tunesmith.runs.folder import RunFolder

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Calibration:
    """What came out. seconds: of everything; num_steps of stage_steps: of a probe and of the stage."""

    stage: str
    method: str
    probes: tuple[Probe, ...]
    choice: Choice
    limits: Limits
    num_steps: int
    stage_steps: int
    num_rows: int
    seconds: float
    folder: Path


def calibrate(
    loaded: LoadedRecipe,
    *,
    stage: str | None = None,
    steps: int | None = None,
    exhaustive: bool = False,
    tell: Tell = lambda text: None,
) -> Calibration:
    """Probe a stage (the last one with a beta, if none is named), and write what was found beside the run.

    Earlier stages that it starts from are run first, in a run of their own, `NAME-calibrate`, which takes what the run
    has finished and which the run takes from later. exhaustive: every point of the grid. steps: of a probe.
    """
    began = time.monotonic()
    bench = bench_of(loaded, stage=stage, steps=steps, tell=tell)
    chosen, folder, searches_beta = bench.stage, bench.folder, bench.beta is not None
    probes = [bench.probe(place) for place in _places(exhaustive, searches_beta=searches_beta)]
    if all(probe.problem for probe in probes):
        remedy = "Set another `learning_rate` in the recipe: the grid lies around it."
        raise NumericsError(f"every probe failed: {probes[0].problem}", where=f"stage {chosen.name}", remedy=remedy)
    while places := next_places(probes, bench.limits, searches_beta=searches_beta):
        probes += [bench.probe(place) for place in places]
    found = Calibration(
        chosen.name,
        chosen.method,
        tuple(probes),
        choose(probes, bench.limits),
        bench.limits,
        bench.num_steps,
        bench.stage_steps,
        len(bench.train),
        time.monotonic() - began,
        folder,
    )
    write_json(folder / "calibrate.json", {**asdict(found), "folder": str(folder), "lines": lines(found)})
    write_text(folder / "calibrate.html", page(found.stage, lines(found), probes, found.choice, found.limits))
    return found


def bench_of(
    loaded: LoadedRecipe, *, stage: str | None = None, steps: int | None = None, tell: Tell = lambda text: None
) -> Bench:
    """What the probes of a stage share, made once: the stages before it finished, rows, model, reference."""
    index = _stage_number(loaded.recipe, stage)
    run = _earlier_stages(loaded, index, tell)
    folder = run.path / "calibrate" / loaded.recipe.stages[index].name
    make_folder(folder)
    return make_bench(loaded.recipe, index, run, steps=steps, folder=folder, tell=tell)


def lines(found: Calibration) -> list[str]:
    """What was found, for a person: a probe a line, the recommendation, and what it cost."""
    table = [probe_line(probe, found.limits, is_best=probe is found.choice.probe) for probe in found.probes]
    best = found.choice.probe
    beta = "" if best.beta is None else f" stages.{found.stage}.beta={best.beta:g}"
    trained = found.num_steps * len(found.probes)
    return [
        *table,
        f"recommended: stages.{found.stage}.learning_rate={best.learning_rate:g}{beta}",
        f"because: {found.choice.why}",
        f"limits of a probe of {found.num_steps} of the stage's {found.stage_steps} steps: "
        f"KL {found.limits.kl:.3g} nats an answer, chosen answers fall {found.limits.fall:.3g} nats a token",
        f"cost: {len(found.probes)} probes, {trained} steps ({trained / found.stage_steps:.1f} times the stage), "
        f"{found.num_rows} rows, {found.seconds:.0f} s",
    ]


def _places(exhaustive: bool, *, searches_beta: bool) -> list[Place]:
    coarse = coarse_places(searches_beta=searches_beta)
    rates, betas = ({place[axis] for place in coarse} for axis in (0, 1))
    if not exhaustive:
        return coarse
    return [(rate, beta) for rate in range(min(rates), max(rates) + 1) for beta in range(min(betas), max(betas) + 1)]


def _stage_number(recipe: Recipe, name: str | None) -> int:
    names = [stage.name for stage in recipe.stages]
    if name is None:
        with_beta = [number for number, stage in enumerate(recipe.stages) if beta_of(stage) is not None]
        return with_beta[-1] if with_beta else len(names) - 1
    if name not in names:
        raise RecipeError(f"has no stage {name!r}", where="--stage", remedy=f"Its stages: {', '.join(names)}.")
    return names.index(name)


def _earlier_stages(loaded: LoadedRecipe, index: int, tell: Tell) -> RunFolder:
    """The run beside the recipe's own whose stages the probed one starts from, finished."""
    recipe = loaded.recipe
    name = f"{recipe.name}-calibrate"
    if recipe.stages[index].start == "previous" and index > 0:
        tell(f"the stages before {recipe.stages[index].name}: taken from runs with equal inputs, or run now, as {name}")
        before = recipe.model_copy(update={"name": name, "stages": recipe.stages[:index]})
        run_recipe(replace(loaded, recipe=before))
    return RunFolder(Path(recipe.runs_folder) / name)
