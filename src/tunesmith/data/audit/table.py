"""An audit in the terminal.

In: an audit and a width. Out: rich renderables; texts of rows are never read as markup. Must not know: checks, files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from tunesmith.data.audit.findings import Audit, Finding, Part, Severity
from tunesmith.data.audit.subject import plural

STYLES: Mapping[Severity, str] = {"blocker": "bold red", "warning": "yellow", "note": "cyan"}
NUM_LISTED = 3  # rows named below a finding; the page and the JSON hold more


def render(audit: Audit, width: int) -> Iterator[RenderableType]:
    """Part by part: facts, one row a finding, and how to mend it."""
    counts = [plural(audit.count(severity), severity) for severity in STYLES]
    yield Text.assemble((audit.title, "bold"), f"  {audit.num_rows:,} rows: {', '.join(counts)}")
    for part in audit.parts:
        yield Text()
        yield from _part(part, width, named=len(audit.parts) > 1)


def _part(part: Part, width: int, *, named: bool) -> Iterator[RenderableType]:
    if named:
        yield Text(part.name, style="bold underline")
    for fact in part.facts:
        yield Text.assemble((f"{fact.name}: ", "dim"), fact.value)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 1, 0), show_header=False, width=width)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold", ratio=1)
    for finding in part.findings:
        table.add_row(Text(finding.severity, style=STYLES[finding.severity]), _body(finding))
    yield Text()
    if part.findings:
        yield table
    if part.passed:
        yield Text.assemble(("nothing found: ", "dim"), (", ".join(part.passed), "dim"))
    if lines := [*part.commands, *(finding.advice for finding in part.findings if finding.advice)]:
        yield Text("\nTo mend:", style="dim")
        parts = (part for line in lines for part in broken_command(line, width - 2))
        # A name that is wider than the page is left whole: a command cut by a newline cannot be copied.
        yield from (Text(part, style="green", no_wrap=True, overflow="ignore") for part in parts)


def broken_command(command: str, width: int) -> list[str]:
    """A command in lines that fit where they can, each but the last ended by a backslash: it survives being copied."""
    lines = [""]
    for word in re.split(r" (?=--|-o )", command):
        if lines[-1] and len(lines[-1]) + len(word) + 3 > width:
            lines.append("   ")
        lines[-1] += f" {word}" if lines[-1] else f"  {word}"
    return [f"{line} \\" for line in lines[:-1]] + lines[-1:]


def _body(finding: Finding) -> Text:
    rows = [f"{hit.id}  {hit.note}" if hit.note else hit.id for hit in finding.shown[:NUM_LISTED]]
    more = len(finding.ids) - len(rows)
    if more > 0:
        rows.append(f"and {more:,} more")
    return Text.assemble((f"{finding.title}: ", "bold"), finding.text, *(Text(f"\n{row}", style="dim") for row in rows))
