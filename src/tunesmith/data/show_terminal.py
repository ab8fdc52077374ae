"""Shown rows in a terminal, in colour or in plain marks.

In: a rich console and shown rows. Out: what is printed. Must not know: where rows come from, HTML.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.panel import Panel
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from tunesmith.data.show import Cell, ShownBranch, ShownRow, ShownTree, visible
from tunesmith.redact import redact

SIDE_BY_SIDE = 100  # columns; below it each answer gets the whole width
# Two shades of each, in turn, so that the edges of tokens show.
TRAINED = ("black on color(151)", "black on color(194)")
CONTEXT = ("default", "default")
CONTROL = ("white on grey37", "white on grey30")
TRAINED_CONTROL = ("white on dark_green", "white on dark_green")
FATES = {"kept": "bold green", "trimmed": "bold yellow", "dropped": "bold yellow", "malformed": "bold red"}


@dataclass(frozen=True, slots=True)
class Marks:
    """What stands around trained text and around control tokens where there is no colour."""

    trained: tuple[str, str]
    control: tuple[str, str]


UNICODE_MARKS = Marks(("⟦", "⟧"), ("‹", "›"))
ASCII_MARKS = Marks(("[[", "]]"), ("{{", "}}"))
ASCII = {"↵": "\\n", "·": " ", "⇥": "\\t", "⟨": "<", "⟩": ">"}


def print_rows(console: Console, rows: Sequence[ShownRow]) -> None:
    """Each row under its rule, and the legend first."""
    colour = has_colour(console)
    _say(console, legend(console))
    for row in rows:
        head = Text.assemble((harmless(row.id), "bold"), "  ", (row.fate, FATES[row.fate]))
        if colour:
            console.print()
            console.print(Rule(head, align="left", style="dim"))
        else:
            _say(console, Text(f"\n--- {harmless(row.id)}  {row.fate}"))
        for tree in row.trees:
            _print_tree(console, tree, titled=len(row.trees) > 1)
        for fact in row.facts():
            _say(console, Text(f"  {harmless(fact)}", style="" if row.trees else "bold"))
        _say(console, Text(f"  format {row.format}: {row.format_reason}", style="dim"))


def has_colour(console: Console) -> bool:
    """Whether colours reach the reader: a terminal, and no NO_COLOR."""
    return console.is_terminal and not console.no_color and console.color_system is not None


def legend(console: Console) -> Text:
    """What the colours, or the marks, mean."""
    if has_colour(console):
        parts = [("trained", TRAINED[0]), ("control token, trained", TRAINED_CONTROL[0]), ("control token", CONTROL[0])]
        text = Text("  ").join(Text(f" {name} ", style=style) for name, style in parts)
        return text.append("  the rest is context, read and not trained")
    marks = _marks(console)
    trained, control = "trained".join(marks.trained), "control token".join(marks.control)
    return Text(f"{trained}  {control}  the rest is context, read and not trained")


def harmless(text: str) -> str:
    """A file name or a reason, which may quote a row, without secrets and without anything that a terminal obeys."""
    return visible(redact(text), before="|", after="|")


def _say(console: Console, text: Text) -> None:
    """One paragraph; folded by a terminal, left whole in a pipe."""
    console.print(text, soft_wrap=not console.is_terminal)


def _print_tree(console: Console, tree: ShownTree, *, titled: bool) -> None:
    if titled:
        _say(console, Text(harmless(tree.id), style="bold"))
    if len(tree.branches) == 1:  # one flow, as the model reads it
        (branch,) = tree.branches
        if branch.label != "answer":
            _say(console, Text(branch.label, style="bold"))
        _say(console, flow((*tree.prompt, *branch.cells), console))
        return
    _say(console, flow(tree.prompt, console))
    if console.is_terminal and console.width >= SIDE_BY_SIDE and len(tree.branches) == 2:
        _side_by_side(console, tree.branches)
        return
    for branch in tree.branches:
        _say(console, Text(f"{branch.label} ({branch.num_trained} trained)", style="bold"))
        _say(console, flow(branch.cells, console))


def _side_by_side(console: Console, branches: Sequence[ShownBranch]) -> None:
    table = Table.grid(expand=True, padding=0)
    for _ in branches:
        table.add_column(ratio=1, overflow="fold")
    titles = [f"{branch.label} ({branch.num_trained} trained)" for branch in branches]
    panels = [
        Panel(flow(branch.cells, console), title=title, title_align="left", border_style="dim")
        for title, branch in zip(titles, branches, strict=True)
    ]
    table.add_row(*panels)
    console.print(table)


def flow(cells: Sequence[Cell], console: Console) -> Text:
    """Cells one after the other, in colour or between marks."""
    return _coloured(cells) if has_colour(console) else _marked(cells, _marks(console), ascii_only=_is_ascii(console))


def _coloured(cells: Sequence[Cell]) -> Text:
    text = Text(overflow="fold")
    for place, cell in enumerate(cells):
        plain = CONTROL if cell.control else CONTEXT
        special = TRAINED_CONTROL if cell.control else TRAINED
        text.append(cell.shown, style=(special if cell.trained else plain)[place % 2])
    return text


def _marked(cells: Sequence[Cell], marks: Marks, *, ascii_only: bool) -> Text:
    """Runs of trained cells between marks; a newline that ends a run stays outside them."""
    parts: list[str] = []
    inside = False
    for cell in cells:
        if cell.trained != inside:
            parts.append(marks.trained[0] if cell.trained else marks.trained[1])
            inside = cell.trained
        parts.append(cell.shown.join(marks.control) if cell.control else cell.shown)
    if inside:
        parts.append(marks.trained[1])
    text = "".join(parts)
    for sign, plain in ASCII.items() if ascii_only else ():
        text = text.replace(sign, plain)
    return Text(text)


def _marks(console: Console) -> Marks:
    return ASCII_MARKS if _is_ascii(console) else UNICODE_MARKS


def _is_ascii(console: Console) -> bool:
    return not console.encoding.lower().startswith("utf")
