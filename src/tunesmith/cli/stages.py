"""The commands that work on runs: quickstart, check, run, compare, chat, merge.

In: words of the command line. Out: one call each, and lines that say where the result lies and what comes next.
Must not know: how anything is done.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tunesmith.errors import DataError

if TYPE_CHECKING:
    from tunesmith.recipe.load import LoadedRecipe

RECIPE = click.argument("recipe", metavar="RECIPE")
OVERRIDES = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
RUN = click.argument("run", metavar="RUN", type=click.Path(path_type=Path))
STAGE = click.option("--stage", metavar="NAME", help="A stage of the run, or base; the last stage if not given.")


def _trust(context: click.Context, _option: click.Parameter, value: bool) -> None:
    """For as long as the command lasts; nothing but this option can switch it on."""
    if value:
        from tunesmith.model.trust import remote_code

        context.with_resource(remote_code())


TRUST = click.option(
    "--trust-remote-code",
    is_flag=True,
    expose_value=False,
    callback=_trust,
    help="Run the model's own Python code; model.revision must be the 40-hex commit that you have read.",
)


def _size(_context: click.Context, _option: click.Parameter, value: str | None) -> str | None:
    """A size such as 16GB or 15.5GiB."""
    if value is not None and re.fullmatch(r"[0-9]+(\.[0-9]+)?(GB|GiB)", value) is None:
        raise click.BadParameter(f"{value!r} is no size: write 16GB (10^9 bytes each) or 16GiB (2^30).")
    return value


@click.command()
@click.option("--name", metavar="NAME", help="Name of the run folder.")
@click.option("--seed", metavar="N", type=click.IntRange(min=0), help="Seed of every random draw.")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def quickstart(name: str | None, seed: int | None, overrides: tuple[str, ...]) -> None:
    """The whole path on an embedded tiny model."""
    from tunesmith.recipe.explain import write_value

    options = {"name": name, "seed": seed}
    given = [f"{key}={write_value(value)}" for key, value in options.items() if value is not None]
    loaded = _load("quickstart", [*given, *overrides])

    from tunesmith.comparison.run import compare_run
    from tunesmith.pipeline.options import RunOptions
    from tunesmith.pipeline.run import run_recipe

    folder = run_recipe(loaded, options=RunOptions(owns_process=True))
    report = compare_run(folder)
    click.echo(f"\nThe run is in {folder}.")
    click.echo(f"  the report:   {report}")
    click.echo(f"  talk to it:   tunesmith chat {folder}")


@click.command()
@RECIPE
@OVERRIDES
@click.option("--gpu-memory", metavar="SIZE", callback=_size, help="Plan for a card of 16GB, say, that is not here.")
@click.option("--no-bf16", is_flag=True, help="That card does not compute in bfloat16 (T4, V100).")
@TRUST
def check(recipe: str, overrides: tuple[str, ...], gpu_memory: str | None, no_bf16: bool) -> None:
    """Check everything that can be known before training: rows, template, memory, time, disk, parity."""
    loaded = _load(recipe, overrides)  # before the heavy imports: a wrong key answers in the first second

    from rich.console import Console

    from tunesmith.pipeline.check import check_recipe

    report = check_recipe(loaded, gpu_memory=gpu_memory, bf16=not no_bf16)
    Console().print(report)
    if not report.ok:
        click.get_current_context().exit(DataError.exit_code)


@click.command()
@RECIPE
@OVERRIDES
@click.option("--strict", is_flag=True, help="End (exit 3) at a damaged checkpoint; do not go back to an older one.")
@click.option("--accept-data-change", is_flag=True, help="Go on where the rows have changed since the run began.")
@click.option("--no-reuse", is_flag=True, help="Train every stage, also those that a run beside it has finished.")
@TRUST
def run(recipe: str, overrides: tuple[str, ...], strict: bool, accept_data_change: bool, no_reuse: bool) -> None:
    """Run every stage; run it again to resume."""
    loaded = _load(recipe, overrides)

    from tunesmith.pipeline.options import RunOptions
    from tunesmith.pipeline.run import run_recipe

    options = RunOptions(strict=strict, accept_data_change=accept_data_change, reuse=not no_reuse, owns_process=True)
    folder = run_recipe(loaded, options=options)
    click.echo(f"\nThe run is in {folder}.")
    if any(stage.makes_policy for stage in loaded.recipe.stages):
        click.echo(f"  compare its stages:   tunesmith compare {folder}")
        click.echo(f"  talk to it:           tunesmith chat {folder}")
        click.echo(f"  merge the adapter:    tunesmith merge {folder}")
    if not all(stage.makes_policy for stage in loaded.recipe.stages):
        click.echo(f"  score a file:         tunesmith score {folder} FILE --out SCORED.jsonl")


@click.command()
@RUN
@TRUST
def compare(run: Path) -> None:
    """Measure the stages of a run side by side."""
    from tunesmith.comparison.run import compare_run

    click.echo(f"The report is {compare_run(run)}.")


@click.command()
@RUN
@STAGE
@TRUST
def chat(run: Path, stage: str | None) -> None:
    """Talk to a stage of a run in the terminal."""
    from tunesmith.serve.chat import chat as talk

    talk(run, stage)


@click.command()
@RUN
@STAGE
@click.option(
    "--to", metavar="FOLDER", type=click.Path(path_type=Path), help="Where to write; inside the run if not given."
)
@TRUST
def merge(run: Path, stage: str | None, to: Path | None) -> None:
    """Write the merged model of a stage."""
    from tunesmith.export.merge import merge_run

    click.echo(f"The merged model is in {merge_run(run, stage, to)}.")


def _load(recipe: str, overrides: Sequence[str]) -> LoadedRecipe:
    from tunesmith.model.trust import require_pinned
    from tunesmith.recipe.load import load_named

    loaded = load_named(recipe, overrides)
    require_pinned(loaded.recipe.model)  # of the recipe as it is written: only its author has read that commit
    return loaded
