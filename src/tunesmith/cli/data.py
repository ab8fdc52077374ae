"""The commands about data: show, audit, fix, diff.

In: words of the command line. Out: rows and findings in the terminal, pages and cleaned copies where asked for.
Must not know: how a row is read, rendered, judged or mended.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tunesmith.errors import DataError, RecipeError

if TYPE_CHECKING:
    from rich.console import Console

    from tunesmith.data.render import Renderer
    from tunesmith.data.show import PickedRows, ShownRow
    from tunesmith.recipe.models import CompletionStage, DpoStage, Recipe, SftStage, Source

QUICKSTART_MODEL = "embedded:quickstart/model"
PIPED_WIDTH = 180  # rich would squeeze tables into 80 columns where it sees no terminal
NO_LIMIT = 2**31 - 1  # a file alone has no stage whose `max_length` could drop its rows

TARGET = click.argument("target", metavar="FILE|RECIPE")
MODEL = click.option("--model", metavar="PATH_OR_ID", help="Whose tokenizer and chat template; a recipe names its own.")
PATH = click.Path(path_type=Path, dir_okay=False)


@click.group()
def data() -> None:
    """Show rows as they are trained; audit, clean and compare data."""


# --- show


@dataclass(frozen=True, slots=True)
class _View:
    """What rows are shown with: their sources, the renderer of the stage, and what a person should know of both."""

    renderer: Renderer
    sources: tuple[Source, ...]  # those that rows are shown of
    others: tuple[Source, ...]  # those that a row may be asked for by its id
    facts: tuple[str, ...]


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
    view = _view(target, stage=stage, model=model, template=template)  # a wrong word answers before the heavy imports

    from rich.console import Console
    from rich.text import Text

    from tunesmith.data.show_html import rows_page
    from tunesmith.data.show_terminal import print_rows
    from tunesmith.runs.atomic import write_text

    rows = _shown_rows(view, row, num_rows)
    console = Console()
    for fact in view.facts:
        console.print(Text(fact, style="dim"), soft_wrap=not console.is_terminal)
    print_rows(console, rows)
    if html is not None:
        write_text(html, rows_page(rows, title=target, facts=view.facts))
        click.echo(f"\nThe page is {html}.")


def _shown_rows(view: _View, row: str | None, num_rows: int) -> list[ShownRow]:
    from tunesmith.data.show import pick_rows, shown_row

    if row is None:
        found = [(source, pick_rows(source, num_rows=num_rows)) for source in view.sources]
    else:
        found = [_find(view, row)]
    return [
        shown_row(each, picked.plan, view.renderer, sanitize=source.sanitize)
        for source, picked in found
        for each in picked.rows
    ]


def _find(view: _View, row: str) -> tuple[Source, PickedRows]:
    """The source that has the row. Raises DataError where several could be meant, or none has it."""
    from tunesmith.data.show import NoSuchRowError, pick_rows

    if row.isdecimal():
        if len(view.sources) > 1:
            remedy = f"Give the row's id, for example {view.sources[0].path}:{row}."
            raise DataError(f"the stage has {len(view.sources)} sources, so row {row} could be of each", remedy=remedy)
        return view.sources[0], pick_rows(view.sources[0], row=row)
    everywhere = (*view.sources, *view.others)
    named = [source for source in everywhere if Path(source.path).name in row]
    problem: NoSuchRowError | None = None
    for source in named or everywhere:
        try:
            return source, pick_rows(source, row=row)
        except NoSuchRowError as error:
            problem = error
    assert problem is not None
    raise problem


def _view(target: str, *, stage: str | None, model: str | None, template: str | None) -> _View:
    if is_recipe(target):
        return _recipe_view(target, stage=stage, model=model, template=template)
    if stage is not None:
        raise RecipeError("--stage names a stage of a recipe, and this is a source of rows", where=target)
    from tunesmith.recipe.models import Source

    facts = [] if model else [f"No --model given: shown with the tokenizer of {QUICKSTART_MODEL}, a tiny one."]
    facts.append("Without a recipe no row is too long.")
    renderer = _renderer(model or QUICKSTART_MODEL, template, None, facts)
    return _View(renderer, (Source(path=target),), (), tuple(facts))


def _recipe_view(target: str, *, stage: str | None, model: str | None, template: str | None) -> _View:
    from tunesmith.recipe.load import load_named
    from tunesmith.recipe.models import SftStage

    recipe = load_named(target).recipe
    chosen = _stage(recipe, stage)
    names = ", ".join(each.name for each in recipe.stages)
    facts = [f"recipe {recipe.name}, stage {chosen.name} ({chosen.method}); its stages: {names}"]
    renderer = _renderer(model or recipe.model.path, template or recipe.model.chat_template, chosen, facts)
    replay = chosen.replay.sources if isinstance(chosen, SftStage) and chosen.replay else []
    return _View(renderer, tuple(chosen.train), (*chosen.heldout, *replay), tuple(facts))


def _stage(recipe: Recipe, name: str | None) -> SftStage | CompletionStage | DpoStage:
    for stage in recipe.stages:
        if name in (None, stage.name):
            return stage
    from tunesmith.recipe.problems import nearest

    names = [stage.name for stage in recipe.stages]
    what = f"the recipe has no stage {name!r}{nearest(str(name), names)}"
    raise RecipeError(what, where=recipe.name, remedy=f"Its stages: {', '.join(names)}.")


def _renderer(
    path: str, chat_template: str | None, stage: SftStage | CompletionStage | DpoStage | None, facts: list[str]
) -> Renderer:
    """The renderer of a stage, or one without limits; what it is like is added to the facts."""
    from tunesmith.data.render import Renderer
    from tunesmith.data.template import choose_template
    from tunesmith.model.load import load_tokenizer
    from tunesmith.recipe.models import Model, SftStage

    tokenizer = load_tokenizer(Model(path=path))
    template = choose_template(tokenizer, chat_template)
    facts.append(f"tokenizer of {path}, {len(tokenizer):,} tokens; chat template: {template.name}")
    if template.note:
        facts.append(template.note)
    if stage is None:
        return Renderer(tokenizer, template, NO_LIMIT)
    train_on = stage.train_on if isinstance(stage, SftStage) else "assistant"
    facts.append(f"max_length {stage.max_length:,}, too_long {stage.too_long}, train_on {train_on}")
    return Renderer(tokenizer, template, stage.max_length, too_long=stage.too_long, train_on=train_on)


def is_recipe(target: str) -> bool:
    """Whether a word means a recipe: a YAML file, or the name of a shipped one where there is no such file."""
    if Path(target).suffix.lower() in (".yaml", ".yml"):
        return True
    from tunesmith.recipe.resources import shipped_recipes

    return not Path(target).exists() and target in shipped_recipes()


def _console() -> Console:
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=PIPED_WIDTH)
