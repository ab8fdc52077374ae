"""The commands about data: show, audit, fix, diff.

In: words of the command line. Out: rows and findings in the terminal, pages and cleaned copies where asked for.
Must not know: how a row is read, rendered, judged or mended.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from tunesmith.cli.views import View, find_row, is_recipe, is_run, source_of, tokenizer_and_template, view_of
from tunesmith.errors import DataError, RecipeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import ConsoleRenderable, RichCast

    from tunesmith.data.audit import Audit
    from tunesmith.data.show import ShownRow
    from tunesmith.recipe.models import Stage

PIPED_WIDTH = 120

TARGET = click.argument("target", metavar="FILE|RECIPE")
MODEL = click.option("--model", metavar="PATH_OR_ID", help="Whose tokenizer and chat template; a recipe names its own.")
PATH = click.Path(path_type=Path, dir_okay=False)


@click.group()
def data() -> None:
    """Show rows as they are trained; audit, clean and compare data."""


# --- show


@data.command()
@TARGET
@click.option("--row", metavar="N|ID", help="One row: the N-th of the source, or its id (file.jsonl:12).")
@click.option("--num-rows", metavar="K", type=click.IntRange(min=1), default=3, show_default=True, help="Rows to show.")
@click.option("--stage", metavar="NAME", help="A stage of the recipe; the first if not given.")
@MODEL
@click.option("--template", metavar="plain|chatml|FILE", help="Another chat template.")
@click.option("--html", metavar="PATH", type=PATH, help="Write a page as well: hover over a token for its id.")
def show(
    target: str,
    row: str | None,
    num_rows: int,
    stage: str | None,
    model: str | None,
    template: str | None,
    html: Path | None,
) -> None:
    """Show rows token by token, as they are trained.

    Trained text, context and control tokens are told apart by colour, or by marks where there is none.
    FILE is anything a recipe's `path` may be. Rows of a RECIPE are rendered as its stage would.
    """
    view = view_of(target, stage=stage, model=model, template=template)  # a wrong word answers before the heavy imports

    from rich.console import Console
    from rich.text import Text

    from tunesmith.data.show_html import rows_page
    from tunesmith.data.show_terminal import harmless, print_rows
    from tunesmith.runs.atomic import write_text

    rows = _shown_rows(view, row, num_rows)
    console = Console()
    for fact in view.facts:
        console.print(Text(harmless(fact), style="dim"), soft_wrap=not console.is_terminal)
    print_rows(console, rows)
    if html is not None:
        write_text(html, rows_page(rows, title=target, facts=view.facts))
        click.echo(f"\nThe page is {html}.")


def _shown_rows(view: View, row: str | None, num_rows: int) -> list[ShownRow]:
    from tunesmith.data.show import pick_rows, shown_row

    if row is None:
        found = [(source, pick_rows(source, num_rows=num_rows)) for source in view.sources]
    else:
        found = [find_row(view, row)]
    return [
        shown_row(each, picked.plan, view.renderer, sanitize=source.sanitize, shape=view.shape)
        for source, picked in found
        for each in picked.rows
    ]


# --- audit


@data.command()
@TARGET
@click.option("--heldout", metavar="FILE", multiple=True, help="Rows that must not be trained on; more than once.")
@click.option("--against", metavar="FILE", multiple=True, help="An evaluation set to look for; more than once.")
@MODEL
@click.option(
    "--max-length",
    metavar="N",
    type=click.IntRange(min=2),
    default=2048,
    show_default=True,
    help="Tokens that a row of FILE may have; counted where there is a --model. A recipe has its own.",
)
@click.option("--html", metavar="PATH", type=PATH, help="Write a page as well.")
@click.option("--json", "as_json", metavar="PATH", type=PATH, help="Write every finding with all of its row ids.")
def audit(
    target: str,
    heldout: tuple[str, ...],
    against: tuple[str, ...],
    model: str | None,
    max_length: int,
    html: Path | None,
    as_json: Path | None,
) -> None:
    """Look for what spoils training: duplicates, leaks, contradictions, secrets and more.

    Each finding is a blocker, a warning or a note, with its rows and the command that mends it. Ends with 2 where there
    is a blocker, else with 0: warnings and notes are for you to judge.
    """
    found = (
        _audit_recipe(target, heldout=heldout, against=against, model=model)
        if is_recipe(target)
        else _audit_source(target, heldout=heldout, against=against, model=model, max_length=max_length)
    )

    import json

    from tunesmith.data.audit import write_html
    from tunesmith.runs.atomic import write_text

    _print(found)
    if html is not None:
        write_html(found, html)
        click.echo(f"\nThe page is {html}.")
    if as_json is not None:
        write_text(as_json, json.dumps(found.to_json(), indent=2) + "\n")
        click.echo(f"\nThe findings are in {as_json}.")
    if found.has_blockers:
        click.get_current_context().exit(DataError.exit_code)


def _audit_source(
    target: str, *, heldout: Sequence[str], against: Sequence[str], model: str | None, max_length: int
) -> Audit:
    from tunesmith.data.audit import audit_source, token_counter
    from tunesmith.data.render import Renderer
    from tunesmith.recipe.models import Model

    measure = None
    if model is not None:
        tokenizer, template, _ = tokenizer_and_template(Model(path=model))
        measure = token_counter(Renderer(tokenizer, template, max_length))
    return audit_source(
        source_of(target),
        heldout=[source_of(path) for path in heldout],
        evaluations=[source_of(path) for path in against],
        measure=measure,
        max_length=max_length,
    )


def _audit_recipe(target: str, *, heldout: Sequence[str], against: Sequence[str], model: str | None) -> Audit:
    from tunesmith.recipe.load import load_named

    recipe = load_named(target).recipe
    if heldout:
        raise RecipeError("--heldout is for a file; a recipe's stages name their own held-out rows", where=target)
    from tunesmith.data.audit import Measure, audit_recipe, token_counter
    from tunesmith.data.prepare import stage_renderer

    chosen = recipe.model if model is None else recipe.model.model_copy(update={"path": model})
    tokenizer, template, _ = tokenizer_and_template(chosen)

    def measure(stage: Stage) -> Measure:
        return token_counter(stage_renderer(stage, tokenizer, template))

    return audit_recipe(recipe, evaluations=[source_of(path) for path in against], measure=measure)


# --- fix


@data.command()
@click.argument("file", metavar="FILE")
@click.option("--drop", metavar="KIND[,KIND]...", multiple=True, help="What to leave out: kinds that `audit` names.")
@click.option("--mask", is_flag=True, help="Replace e-mail addresses, numbers and secrets by placeholders.")
@click.option("--against", metavar="FILE", multiple=True, help="Rows for `--drop leakage` to look for.")
@click.option("-o", "--out", metavar="OUT", type=PATH, required=True, help="Where the copy goes: a .jsonl file.")
def fix(file: str, drop: tuple[str, ...], mask: bool, against: tuple[str, ...], out: Path) -> None:
    """Write a cleaned copy; FILE itself is never changed.

    Beside the copy, OUT.lineage.json says which rows were left out or changed, why, and the hashes of both files.
    """
    from tunesmith.data.fix import fix_source

    kinds = list(dict.fromkeys(kind.strip() for words in drop for kind in words.split(",") if kind.strip()))
    others = [source_of(path) for path in against]
    _print(fix_source(source_of(file), out=out, drop=kinds, masked=mask, against=others))


# --- diff


@data.command()
@click.argument("before", metavar="A")
@click.argument("after", metavar="B")
def diff(before: str, after: str) -> None:
    """Show rows added, removed and changed from A to B: two sources, or two run folders."""
    from tunesmith.data.diff import diff_ledgers, diff_sources

    if is_run(before) or is_run(after):
        _print(diff_ledgers(Path(before), Path(after)))
        return
    _print(diff_sources(source_of(before), source_of(after)))


# --- what several commands share


def _print(report: RichCast | ConsoleRenderable) -> None:
    """Prints a report. In a pipe lines keep their length, so that commands in them can be copied whole."""
    from rich.console import Console

    console = Console()
    if console.is_terminal:
        console.print(report, crop=False)
        return
    console = Console(width=PIPED_WIDTH)  # rich would squeeze tables into 80 columns
    with console.capture() as captured:
        console.print(report, crop=False)
    click.echo("\n".join(line.rstrip() for line in captured.get().splitlines()))
