"""The check: everything about a run that can be known before training, on the user's own model and rows.

In: a loaded recipe. Out: a report of named lines. Nothing is written. Must not know: the command line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from tunesmith.data.ledger import fates_text
from tunesmith.data.plan import packing_report
from tunesmith.data.render import Renderer
from tunesmith.data.store import Joined, sizes_of
from tunesmith.engine.parity import check_parity
from tunesmith.errors import ModelError, TunesmithError
from tunesmith.model.load import forward_dtype
from tunesmith.model.machine import Machine
from tunesmith.model.policy import Weights, policy_for_training
from tunesmith.model.shapes import weight_bytes
from tunesmith.pipeline.memory_stages import Forecast, disk_bytes, memory_limit, predict_stages
from tunesmith.pipeline.memory_table import memory_text, proposal_text, time_text
from tunesmith.pipeline.prepare import PreparedRun, prepare_run
from tunesmith.pipeline.starts import start_weights
from tunesmith.recipe.load import LoadedRecipe
from tunesmith.recipe.models import Recipe
from tunesmith.recipe.order import previous_policy
from tunesmith.runs.disk import free_bytes
from tunesmith.runs.folder import RunFolder
from tunesmith.train.precision import autocast_of

Verdict = Literal["ok", "warning", "error"]
GIB = 2**30
MARKS = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "error": ("✗", "red")}


@dataclass(frozen=True, slots=True)
class CheckLine:
    """One thing that was checked, and what came out."""

    subject: str
    verdict: Verdict
    text: str


@dataclass(slots=True)
class CheckReport:
    """All lines; prints itself through rich."""

    lines: list[CheckLine] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """True where a run would start."""
        return all(line.verdict != "error" for line in self.lines)

    def add(self, subject: str, text: str, verdict: Verdict = "ok") -> None:
        """Append a line."""
        self.lines.append(CheckLine(subject, verdict, text))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table.grid(padding=(0, 2))
        for line in self.lines:
            mark, colour = MARKS[line.verdict]
            table.add_row(Text(mark, style=colour), Text(line.subject, style="bold"), Text(line.text))
        yield table
        yield Text("Ready to run." if self.ok else "A run would stop at the lines marked ✗.", style="bold")


def check_recipe(loaded: LoadedRecipe, *, gpu_memory: str | None = None, bf16: bool = True) -> CheckReport:
    """Check recipe, data, template, stop token, memory, parity and disk. Errors of the user's become lines.

    `gpu_memory`, such as `16GB`, plans for a card that is not there, with or without bfloat16: no weight is loaded.
    """
    recipe = loaded.recipe
    report = CheckReport()
    report.add("recipe", f"{loaded.source}: {len(recipe.stages)} stages, run folder {_folder(recipe).path}")
    try:
        prepared = prepare_run(recipe)
        data_lines(report, prepared)
        template_lines(report, prepared.renderer)
        machine = Machine.detect(recipe.threads)
        gpu_bytes = None if gpu_memory is None else memory_limit(gpu_memory)
        forecasts = predict_stages(recipe, prepared, machine, gpu_bytes=gpu_bytes, bf16=bf16)
        memory_lines(report, forecasts)
        packing_lines(report, recipe, prepared, forecasts)
        if gpu_bytes is None:
            _stage_lines(report, recipe, prepared, machine)
        else:
            for stage in recipe.stages:
                report.add(f"parity {stage.name}", "not checked: planned for another device", "warning")
    except TunesmithError as problem:
        report.add("stopped", problem.message(), "error")
    return report


def memory_lines(report: CheckReport, forecasts: Sequence[Forecast]) -> None:
    """What each stage will take, whether it fits, and what would make it fit; then time and disk."""
    for forecast in forecasts:
        report.add(f"memory {forecast.stage}", memory_text(forecast), "ok" if forecast.fitting else "error")
        if not forecast.fitting:
            report.add(f"proposal {forecast.stage}", proposal_text(forecast), "warning")
    report.add("time", time_text(forecasts))


def packing_lines(report: CheckReport, recipe: Recipe, prepared: PreparedRun, forecasts: Sequence[Forecast]) -> None:
    """How full the forests of each stage are, of the size that was forecast."""
    for stage, forecast in zip(recipe.stages, forecasts, strict=True):
        rows, tokens = prepared.stages[stage.name].train, forecast.setting.forest_tokens
        packing = packing_report(rows, tokens, batch_size=stage.batch_size, seed=recipe.seed)
        report.add(f"packing {stage.name}", packing.line().removeprefix("packing: "))


def _folder(recipe: Recipe) -> RunFolder:
    return RunFolder(Path(recipe.runs_folder) / recipe.name)


def data_lines(report: CheckReport, prepared: PreparedRun) -> None:
    """Formats, dropped rows, and what is left to train and evaluate on, stage by stage; then every row's fate."""
    for name, stage in prepared.stages.items():
        for note in stage.notes:
            report.add(f"data {name}", note, "warning" if note.startswith("WARNING") else "ok")
        sizes = sizes_of(Joined(stage.train, stage.heldout))
        tokens, unshared = int(sizes.num_tokens.sum()), int(sizes.num_unshared.sum())
        sides = f"{len(stage.train)} training, {len(stage.heldout)} held-out, {len(stage.replay)} replay rows"
        saved = f", {1 - tokens / unshared:.0%} saved by sharing prompts" if unshared > tokens else ""
        trained = int(sizes.num_trained.sum())
        report.add(f"data {name}", f"{sides}; {tokens:,} tokens, {trained:,} of them trained{saved}")
    fates = fates_text({name: stage.ledger for name, stage in prepared.stages.items()})
    report.add("rows", f"what became of every row (ledger.parquet names each):\n{fates}")


def template_lines(report: CheckReport, renderer: Renderer) -> None:
    """The template, what ends an answer, and where generation will stop. Raises ModelError where they disagree."""
    ending = renderer.shape.ending
    report.add("template", f"{renderer.template.name}, sha256 {renderer.template.sha[:12]}")
    tokens = ", ".join(f"{renderer.tokenizer.convert_ids_to_tokens(each)} ({each})" for each in renderer.stop_ids)
    report.add("stop token", f"answers end in {ending!r}, which is trained; generation stops at {tokens}")


def _stage_lines(report: CheckReport, recipe: Recipe, prepared: PreparedRun, machine: Machine) -> None:
    """Parity on every stage's rows, and the room that checkpoints need.

    A stage that starts from one that is not finished yet is checked on the base, whose shapes it shares.
    """
    run = _folder(recipe)
    need = 0
    for index, stage in enumerate(recipe.stages):
        before = previous_policy(recipe.stages, index)
        waits = before is not None and stage.start == "previous"
        waits = waits and not run.stage(recipe.stages[before or 0].name).result_path.is_file()
        weights = Weights(recipe.model) if waits else start_weights(recipe, index, run)
        autocast = autocast_of(forward_dtype(weights.full, machine.device), machine.device)
        scores = not stage.makes_policy
        policy = policy_for_training(weights, stage.tuning, device=machine.device, seed=recipe.seed, scores=scores)
        if policy.added.note:
            report.add(f"tokens {stage.name}", policy.added.note)
        rows = prepared.stages[stage.name]
        trees = Joined(rows.train, rows.heldout, rows.replay)
        verdict: Verdict
        try:
            parity = check_parity(policy.model, trees, attention=recipe.model.attention, autocast=autocast)
            text, verdict = parity.line().removeprefix("parity: "), "ok" if parity.passed else "warning"
        except ModelError as problem:  # a kernel that the recipe names and that cannot be used; other stages go on
            text, verdict = problem.message(), "error"
        report.add(f"parity {stage.name}", text, verdict)
        need += disk_bytes(stage, weight_bytes(policy.model))
    free = free_bytes(run.path)
    room = f"{need / GIB:.2f} GiB for checkpoints and results, {free / GIB:.1f} GiB free"
    report.add("disk", room, "ok" if free > need else "error")
