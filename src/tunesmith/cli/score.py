"""The command that scores a file by a run's reward model.

In: words of the command line. Out: a file, and lines that say what came out. Must not know: how a score is made.
"""

from __future__ import annotations

from pathlib import Path

import click

from tunesmith.cli.stages import TRUST


def _share(_context: click.Context, _option: click.Parameter, value: str | None) -> float | None:
    """`10%` or `10` as 0.1."""
    if value is None:
        return None
    try:
        share = float(value.strip().removesuffix("%")) / 100
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise click.BadParameter(f"{value!r} is no percentage above 0: write 10%.")
    return share


@click.command()
@click.argument("run", metavar="RUN[:STAGE]")
@click.argument("file", metavar="FILE", type=click.Path(path_type=Path))
@click.option("--out", metavar="FILE", required=True, type=click.Path(path_type=Path), help="A new .jsonl file.")
@click.option("--make-pairs", is_flag=True, help="Write the best and the worst answer of each prompt, as pairs.")
@click.option("--keep-above", metavar="X", type=float, help="Only rows with a higher score (pairs: difference).")
@click.option("--keep-top", metavar="P%", callback=_share, help="Only the best P percent of the rows (of the pairs).")
@click.option("--column", metavar="NAME", default="score", show_default=True, help="Name of the new column.")
@click.option("--format", "name", metavar="FORMAT", default="auto", help="The shape of the rows, as in a recipe.")
@TRUST
def score(
    run: str,
    file: Path,
    out: Path,
    make_pairs: bool,
    keep_above: float | None,
    keep_top: float | None,
    column: str,
    name: str,
) -> None:
    """Score answers, pairs or rankings by a reward model.

    The rows keep their fields. An answer gets `score`; a pair `chosen_score`, `rejected_score` and their difference as
    `score`; several answers a list. Rows that cannot be scored (too long, an empty answer) get null, and are counted.
    """
    from tunesmith.data.formats import FORMATS
    from tunesmith.pipeline.score import ScoreOptions, score_file

    found = next((each for each in ("auto", *FORMATS) if each == name), None)
    if found is None:
        raise click.BadParameter(f"{name!r} is no format; there are {', '.join(FORMATS)}.", param_hint="--format")
    options = ScoreOptions(column, make_pairs, keep_above, keep_top, found)
    report = score_file(run, file, out, options, tell=click.echo)
    what = "pairs" if make_pairs else "rows"
    click.echo(f"{report.num_written:,} {what} of {report.num_read:,} rows are in {report.path}.")
    if report.mean is not None:
        click.echo(f"  scores: mean {report.mean:.3f}, standard deviation {report.spread:.3f}")
    if report.accuracy is not None:
        click.echo(f"  the chosen answer has the higher score in {report.accuracy:.1%} of the pairs")
    for reason, count in report.unscored:
        click.echo(f"  {count:,} rows without a score: {reason}")
