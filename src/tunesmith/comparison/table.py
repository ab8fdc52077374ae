"""The comparison in the terminal: one table and the verdict.

In: a summary. Out: lines on a console. Must not know: how a figure was made.
"""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tunesmith.comparison.figures import FIGURES
from tunesmith.comparison.summary import Summary
from tunesmith.comparison.words import interval, number

STYLES = {"better": "green", "worse": "red", "open": "yellow"}
MARKS = {"better": "+", "worse": "-", "open": "="}


def print_summary(summary: Summary, console: Console) -> None:
    """Print the figures of every stage with their intervals, then the verdict line by line."""
    table = Table(title=None, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("held-out figure, 95 % interval")
    for name in summary.stages:
        table.add_column(Text(name), justify="right", no_wrap=True)
    for figure in FIGURES:
        estimates = [figures[figure.key] for figures in summary.stages.values()]
        if all(estimate.value is None for estimate in estimates):
            continue
        cells = []
        for estimate in estimates:
            spread = interval(estimate, figure.unit)
            cells.append(Text.assemble(number(estimate.value, figure.unit), (f"\n{spread}", "dim") if spread else ""))
        table.add_row(Text(figure.title), *cells)
    console.print()
    console.print(table)
    for verdict in summary.verdicts:
        console.print()
        console.print(Text(f"{verdict.stage} against {verdict.against}", style="bold"))
        for finding in verdict.findings:
            console.print(Text.assemble((f"  {MARKS[finding.outcome]} ", STYLES[finding.outcome]), finding.text))
    for note in summary.notes:
        console.print(Text(note, style="yellow"))
