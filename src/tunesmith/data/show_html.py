"""Shown rows as one self-contained HTML page that runs nothing and loads nothing.

In: shown rows and a few facts. Out: the page's text. Must not know: where rows come from, terminals.

Everything is text to the template, which escapes it all; a content security policy forbids scripts and loads.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from tunesmith.data.show import Cell, ShownRow
from tunesmith.version import VERSION


def rows_page(rows: Sequence[ShownRow], *, title: str, facts: Sequence[str]) -> str:
    """The page. `facts` stand under the title: model, template, settings, notes."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("show.html.j2")
    return template.render(rows=rows, title=title, facts=facts, version=VERSION, tip=tip)


def tip(cell: Cell) -> str:
    """What hovering over a cell shows."""
    last = cell.index + len(cell.ids) - 1
    place = f"token {cell.index}" if last == cell.index else f"tokens {cell.index} to {last}"
    ids = ", ".join(map(str, cell.ids))
    return f"{place} · id {ids} · {cell.text!r} · {cell.kind}"
