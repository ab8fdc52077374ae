"""`tunesmith calibrate`: a learning rate and a beta for a stage, from short probes.

In: words of the command line. Out: one call, the table, and the overrides that the recipe needs.
Must not know: how a probe is made.
"""

from __future__ import annotations

import click

from tunesmith.cli.stages import OVERRIDES, RECIPE, TRUST


@click.command()
@RECIPE
@OVERRIDES
@click.option("--stage", metavar="NAME", help="The stage to calibrate; the last one with a beta if not given.")
@click.option("--steps", metavar="N", type=click.IntRange(min=2), help="Steps of a probe; a quarter of the stage's.")
@click.option("--exhaustive", is_flag=True, help="Probe every point of the grid, not coarse to fine.")
@TRUST
def calibrate(recipe: str, overrides: tuple[str, ...], stage: str | None, steps: int | None, exhaustive: bool) -> None:
    """Find a learning rate and a beta by short probes on a sample of a stage's rows."""
    from tunesmith.model.trust import require_pinned
    from tunesmith.recipe.load import load_named

    loaded = load_named(recipe, overrides)
    require_pinned(loaded.recipe.model)

    from tunesmith.pipeline.calibrate import calibrate as search
    from tunesmith.pipeline.calibrate import lines

    found = search(
        loaded, stage=stage, steps=steps, exhaustive=exhaustive, tell=lambda text: click.echo(text, err=True)
    )
    click.echo("\n".join(lines(found)))
    click.echo(f"\nThe plot is {found.folder / 'calibrate.html'}.")
