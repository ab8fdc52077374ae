"""The commands about recipes themselves: schema, explain, list.

In: words of the command line. Out: JSON or a table on stdout. Must not know: runs, models, data.
"""

from __future__ import annotations

import sys

import click

PIPED_WIDTH = 180  # rich would squeeze the table into 80 columns where it sees no terminal


@click.group()
def recipe() -> None:
    """Explain, list, or print the schema of recipes."""


@recipe.command()
def schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    import json

    from tunesmith.recipe.schema import recipe_schema

    click.echo(json.dumps(recipe_schema(), indent=2, ensure_ascii=False))


@recipe.command()
@click.argument("recipe", metavar="RECIPE")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def explain(recipe: str, overrides: tuple[str, ...]) -> None:
    """Print every resolved value, its unit, where it came from and why it is there."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from tunesmith.recipe.explain import explain as explain_loaded
    from tunesmith.recipe.load import load_named

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("key", "value", "unit", "from"):
        table.add_column(heading, overflow="fold")
    table.add_column("why", overflow="fold", style="dim", ratio=1)
    for row in explain_loaded(load_named(recipe, overrides)):
        cells = (row.path, row.value, row.unit, row.origin, row.why)
        table.add_row(*(Text(cell) for cell in cells))  # Text, so that a value in [brackets] is not read as markup
    Console(width=None if sys.stdout.isatty() else PIPED_WIDTH).print(table)


@recipe.command(name="list")
def list_recipes() -> None:
    """List the recipes that come with Tunesmith."""
    from tunesmith.recipe.load import load_recipe
    from tunesmith.recipe.resources import shipped_recipes

    shipped = shipped_recipes()
    width = max(map(len, shipped), default=0)
    for name, path in shipped.items():
        loaded = load_recipe(path).recipe
        stages = " -> ".join(stage.method for stage in loaded.stages)
        click.echo(f"{name:{width}}  {loaded.model.path}: {stages}")
    click.echo("\nRun one by its name, or copy its file as a start:")
    for path in {path.parent for path in shipped.values()}:
        click.echo(f"  {path}")
