"""The report: one self-contained HTML file that opens offline and runs nothing.

In: a run folder, its recipe, the comparison's summary and answers. Out: report.html.
Must not know: models, how a figure was made.

Everything that comes from a recipe, a data file or a model is text: the template escapes it all, there is no script,
and a content security policy forbids scripts, frames, forms and every load from elsewhere (TRAPS S14).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from tunesmith.comparison.charts import HEIGHT, LEFT, RIGHT, WIDTH, Chart, Whisker, whiskers
from tunesmith.comparison.curves import stage_charts
from tunesmith.comparison.figures import FIGURES, Figure
from tunesmith.comparison.summary import Answered, Summary
from tunesmith.comparison.words import bare_number, interval, number
from tunesmith.data.ledger import FATES, Count, read_parquet
from tunesmith.diagnosis.diagnose import StageFindings, diagnose_run
from tunesmith.recipe.models import Recipe, SftStage
from tunesmith.recipe.preferences import PreferenceStage
from tunesmith.runs.atomic import write_text
from tunesmith.runs.folder import RunFolder
from tunesmith.runs.records import read_records
from tunesmith.version import VERSION

NUM_COLOURS = 5
"""Stage colours in the style sheet; further stages take the last one."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One figure of one stage, in words."""

    stage: str
    value: str
    spread: str
    reason: str


@dataclass(frozen=True, slots=True)
class FigureRow:
    """One line of the table of figures."""

    figure: Figure
    cells: tuple[Cell, ...]
    whiskers: tuple[Whisker, ...]
    num: int


@dataclass(frozen=True, slots=True)
class StageView:
    """A stage in the report: its colour, how it was trained, its curves, and what looked wrong in them."""

    name: str
    css: str
    what: str
    charts: tuple[Chart, ...]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class FindingsView:
    """What a stage's records show, and its colour."""

    stage: StageFindings
    css: str


@dataclass(frozen=True, slots=True)
class LedgerRow:
    """Rows of one stage and split, by what became of them."""

    stage: str
    split: str
    kept: int
    trimmed: int
    merged: int
    dropped: int
    trained_tokens: int
    reasons: tuple[tuple[str, int], ...]


def write_report(folder: RunFolder, recipe: Recipe, summary: Summary, answers: Sequence[Answered]) -> Path:
    """Write the run's report.html and return its path."""
    write_text(folder.report_path, report_html(folder, recipe, summary, answers))
    return folder.report_path


def report_html(folder: RunFolder, recipe: Recipe, summary: Summary, answers: Sequence[Answered]) -> str:
    """The report as text. Files that a run does not have (ledger, manifest, recipe) leave their part out."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = environment.get_template("report.html.j2").render(
        summary=summary,
        recipe=recipe,
        recipe_text=folder.recipe_path.read_text("utf-8") if folder.recipe_path.is_file() else "",
        stages=_stage_views(folder, recipe, summary),
        scorers=_scorer_views(folder, recipe),
        rows=[row for row in figure_rows(summary) if any(not cell.reason for cell in row.cells)],
        unmeasured=_unmeasured(summary),
        figures=FIGURES,
        findings=_findings(folder, recipe, summary),
        answers=answers[: recipe.compare.num_shown],
        ledger=ledger_rows(read_parquet(folder.ledger_path).summary()) if folder.ledger_path.is_file() else [],
        versions=_versions(folder),
        chosen_longer=number(summary.pairs.chosen_longer.value, "share"),
        frame={"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT},
    )
    return html.encode("utf-8", "backslashreplace").decode("utf-8")  # half a surrogate pair cannot be written


def figure_rows(summary: Summary) -> list[FigureRow]:
    """The table of figures, one row a figure, one cell a stage."""
    rows: list[FigureRow] = []
    for figure in FIGURES:
        estimates = [(stage, figures[figure.key]) for stage, figures in summary.stages.items()]
        cells = tuple(
            Cell(
                stage,
                number(one.value, figure.unit) if figure.unit == "share" else bare_number(one.value, figure.unit),
                interval(one, figure.unit),
                one.reason if one.value is None else "",
            )
            for stage, one in estimates
        )
        dots = whiskers(
            [(colour(place), one) for place, (_, one) in enumerate(estimates)], is_share=figure.unit == "share"
        )
        rows.append(FigureRow(figure, cells, dots, max(one.num for _, one in estimates)))
    return rows


def colour(place: int) -> str:
    """The class that colours the stage at `place`; the base is the first."""
    return f"stage-{min(place, NUM_COLOURS - 1)}"


def ledger_rows(counts: Sequence[Count]) -> list[LedgerRow]:
    """The ledger's counts, one line a stage and split, training first."""
    groups: dict[tuple[str, str], list[Count]] = {}
    for count in sorted(counts, key=lambda each: each.split, reverse=True):
        groups.setdefault((count.stage, count.split), []).append(count)
    stages = list(dict.fromkeys(count.stage for count in counts))
    rows: list[LedgerRow] = []
    for (stage, split), group in sorted(groups.items(), key=lambda item: stages.index(item[0][0])):
        reasons: dict[str, int] = {}
        fates = dict.fromkeys(FATES, 0)
        for count in group:
            fates[count.outcome] += count.num_rows
            if count.reason:
                reasons[count.reason] = reasons.get(count.reason, 0) + count.num_rows
        rows.append(
            LedgerRow(
                stage=stage,
                split="held out" if split == "heldout" else split,
                kept=fates["kept"],
                trimmed=fates["trimmed"],
                merged=fates["merged"],
                dropped=fates["dropped"],
                trained_tokens=sum(count.trained_tokens for count in group),
                reasons=tuple(sorted(reasons.items(), key=lambda item: (-item[1], item[0]))),
            )
        )
    return rows


def _stage_views(folder: RunFolder, recipe: Recipe, summary: Summary) -> list[StageView]:
    settings = {stage.name: stage for stage in recipe.stages}
    views: list[StageView] = []
    for place, name in enumerate(summary.stages):
        stage = settings.get(name)
        if stage is None:
            views.append(StageView(name, colour(place), "the untrained base", ()))
            continue
        files = folder.stage(name)
        charts = stage_charts(
            read_records(files.metrics_path),
            read_records(files.eval_path),
            is_preference=isinstance(stage, PreferenceStage),
            has_replay=isinstance(stage, SftStage) and stage.replay is not None,
        )
        what = f"{stage.method}, {'LoRA' if stage.tuning.kind == 'lora' else 'all weights'}"
        beta = stage.model_dump().get("beta") if isinstance(stage, PreferenceStage) else None
        beta = "" if beta is None else f", beta {beta:g}"
        what += f", peak learning rate {stage.learning_rate:g}, {stage.batch_size} examples a step{beta}"
        views.append(StageView(name, colour(place), what, tuple(charts), _warnings(files.warnings_path)))
    return views


def _findings(folder: RunFolder, recipe: Recipe, summary: Summary) -> list[FindingsView]:
    """The diagnoses of every trained stage, in the order of the recipe."""
    places = {name: place for place, name in enumerate(summary.stages)}
    found = diagnose_run(folder, recipe)
    return [FindingsView(each, colour(places[each.stage])) for each in found if each.stage in places]


def _scorer_views(folder: RunFolder, recipe: Recipe) -> list[StageView]:
    """The reward models, which stand in no comparison: their curves, and how well the last evaluation found them."""
    views = []
    for stage in recipe.stages:
        files = folder.stage(stage.name)
        if stage.makes_policy or not files.metrics_path.is_file():
            continue
        evaluations = read_records(files.eval_path) if files.eval_path.is_file() else []
        charts = stage_charts(
            read_records(files.metrics_path), evaluations, is_preference=True, has_replay=False, scores=True
        )
        last = evaluations[-1] if evaluations else {}
        names = {"accuracy": "accuracy", "calibration_error": "calibration error", "brier": "Brier score"}
        found = {words: last.get(key) for key, words in names.items()}
        said = [f"{words} {value:.3f}" for words, value in found.items() if isinstance(value, float)]
        what = f"a reward model{', held out: ' if said else ''}{', '.join(said)}"
        views.append(StageView(stage.name, colour(NUM_COLOURS), what, tuple(charts), _warnings(files.warnings_path)))
    return views


def _warnings(path: Path) -> tuple[str, ...]:
    """What looked wrong while the stage trained, one text each."""
    texts = []
    for line in read_records(path):
        if "severity" in line:
            continue  # a diagnosis: the report has a section of them
        causes = line.get("causes")
        also = f". Possible causes: {'; '.join(causes)}" if isinstance(causes, list) and causes else ""
        texts.append(f"Step {line['step']}: {str(line['text']).rstrip('.')}{also}.")
    return tuple(texts)


def _unmeasured(summary: Summary) -> list[tuple[str, str]]:
    """Figures that no stage has, with the reason."""
    rows = [row for row in figure_rows(summary) if all(cell.reason for cell in row.cells)]
    return [(row.figure.title, row.cells[0].reason) for row in rows]


def _versions(folder: RunFolder) -> list[tuple[str, str]]:
    manifest = folder.read_manifest()
    packages = manifest.get("packages")
    found = [("tunesmith", str(manifest.get("tunesmith", VERSION)))]
    found += [(key, str(manifest[key])) for key in ("python", "platform") if manifest.get(key)]
    if isinstance(packages, dict):
        found += [(str(name), str(version)) for name, version in packages.items()]
    if manifest.get("git"):
        found.append(("git commit", str(manifest["git"])))
    return found
