"""Rows as they are trained, token by token, for a person to look at.

In: a source, the renderer of a stage, which rows are wanted. Out: `ShownRow`s: cells of text with their token ids,
trained or not, and what is to be said of the row. Reads no further than the rows that are wanted.
Must not know: terminals, HTML (`show_terminal` and `show_html` draw what comes out here), models.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal

from tunesmith.data.formats import DegenerateRow, FormatPlan, decode_row, plan_format
from tunesmith.data.render import Rendered, Renderer
from tunesmith.data.shape import AS_READ, Shape, shaped_example, shaped_trees
from tunesmith.data.sources import iter_rows
from tunesmith.data.tokens import Codec
from tunesmith.data.types import BadRow, Example, Row, Tree
from tunesmith.errors import DataError
from tunesmith.recipe.models import Source
from tunesmith.redact import secret_spans

FORMAT_ROWS = 1024  # the format is decided from as many rows as preparation decides it from
LONGEST_CHARACTER = 4  # bytes of a character in UTF-8, so the most tokens that one can be split over
JOINERS = "\u200c\u200d"  # part of how Persian and emoji are written; other invisible characters are spelled out

Fate = Literal["kept", "trimmed", "dropped", "malformed"]


@dataclass(frozen=True, slots=True)
class Cell:
    """One token, or the few that make up one character. `shown` is `text` with its white space made visible."""

    text: str
    shown: str
    ids: tuple[int, ...]
    index: int  # of the first of the ids, counted from the start of prompt + answer
    trained: bool
    control: bool

    @property
    def kind(self) -> str:
        """In words: what the training does with it."""
        return ("trained" if self.trained else "context") + (", control token" if self.control else "")


@dataclass(frozen=True, slots=True)
class ShownBranch:
    """One answer; `label` says which."""

    label: str
    cells: tuple[Cell, ...]
    num_trained: int


@dataclass(frozen=True, slots=True)
class ShownTree:
    """A prompt, once, and its answers."""

    id: str
    prompt: tuple[Cell, ...]
    branches: tuple[ShownBranch, ...]
    num_prompt: int


@dataclass(frozen=True, slots=True)
class Token:
    """A token by name and number."""

    id: int
    text: str

    def __str__(self) -> str:
        return f"{self.text!r} ({self.id})"


@dataclass(frozen=True, slots=True)
class ShownRow:
    """A row with its fate. `reason` says why it is not kept as it stands; then there may be no trees."""

    id: str
    format: str
    format_reason: str
    fate: Fate
    reason: str = ""
    trees: tuple[ShownTree, ...] = ()
    notices: tuple[str, ...] = ()
    terminators: tuple[Token, ...] = ()
    stops: tuple[Token, ...] = ()

    @property
    def num_prompt(self) -> int:
        """Tokens of the prompts, each once."""
        return sum(tree.num_prompt for tree in self.trees)

    @property
    def num_trained(self) -> int:
        """Tokens that a loss reads."""
        return sum(branch.num_trained for tree in self.trees for branch in tree.branches)

    def facts(self) -> list[str]:
        """What stands under the row: counts, what ends the answers and what generation stops at, notices."""
        lines = [f"{self.fate}: {self.reason}"] if self.reason else []
        if self.trees:
            ends = ", ".join(map(str, self.terminators))
            stops = ", ".join(map(str, self.stops))
            lines.append(f"{self.num_prompt:,} prompt tokens, {self.num_trained:,} trained")
            lines.append(f"the last trained token is {ends}; generation stops at {stops}")
        return [*lines, *self.notices]


class NoSuchRowError(DataError):
    """The source was read to its end, and no row was the wanted one."""


@dataclass(frozen=True, slots=True)
class PickedRows:
    """The wanted rows of a source, and how to read them; `plan` is None where no row could be read."""

    plan: FormatPlan | None
    rows: tuple[Row | BadRow, ...]


def pick_rows(source: Source, *, row: str | None = None, num_rows: int = 3) -> PickedRows:
    """The first rows of a source, or the one that `row` names: its number, counted from 1, or its id.

    Raises NoSuchRowError, and whatever opening the source and deciding its format raise.
    """
    stream = iter_rows(source)
    head = list(islice(stream, FORMAT_ROWS))
    readable = [item for item in head if isinstance(item, Row)]
    if not head:
        raise DataError("the source holds no rows", where=source.path, remedy="Give a file with at least one row.")
    plan = plan_format(readable, source) if readable else None
    if row is None:
        return PickedRows(plan, tuple(head[:num_rows]))
    return PickedRows(plan, (_find(row, head, stream, source.path),))


def _find(wanted: str, head: Sequence[Row | BadRow], rest: Iterator[Row | BadRow], where: str) -> Row | BadRow:
    count = 0
    for part in (head, rest):
        for item in part:
            count += 1
            named = count == int(wanted) if wanted.isdecimal() else is_named(item.id, wanted)
            if named:
                return item
    remedy = "Rows are counted from 1; an id is what `show` prints over a row, for example file.jsonl:12."
    raise NoSuchRowError(f"no row {wanted}: the source has {count:,}", where=where, remedy=remedy)


def is_named(row_id: str, wanted: str) -> bool:
    """Whether an id is the wanted one, with or without the folders before the file."""
    return row_id == wanted or row_id.endswith(f"/{wanted}")


def shown_row(
    row: Row | BadRow,
    plan: FormatPlan | None,
    renderer: Renderer,
    *,
    sanitize: bool = True,
    shape: Shape = AS_READ,
) -> ShownRow:
    """One row as a stage with this renderer and shape of rows would train it, or why it would not.

    Answers of other rows, which stand beside a judged one when it is trained, are not shown.
    Raises ModelError where the template cannot be trained on at all.
    """
    form, why = (plan.format, plan.reason) if plan is not None else ("unknown", "no row could be read")
    decoded = decode_row(row, plan) if isinstance(row, Row) and plan is not None else row
    made: Counter[str] = Counter()
    if isinstance(row, Row) and plan is not None and isinstance(decoded, Example):
        decoded = shaped_example(row, decoded, shape, made, is_ranked=plan.format == "ranked")
    if isinstance(decoded, BadRow):
        what = f"{decoded.field}: found {decoded.found}; wanted {decoded.wanted}"
        return ShownRow(row.id, form, why, "malformed", what)
    if isinstance(decoded, DegenerateRow):
        return ShownRow(row.id, form, why, "dropped", decoded.reason)
    assert isinstance(decoded, Example)
    rendered = renderer.render_many([decoded], sanitize=sanitize)[0]
    weighed = [f"weight {decoded.weight:g}"] if shape.reads_weights else []
    trees, notices = shaped_trees(decoded, rendered.trees, shape), (*rendered.notices, *made, *weighed)
    rendered = replace(rendered, trees=trees, notices=notices)
    if rendered.error is not None:
        fate: Fate = "malformed" if rendered.error.fatal else "dropped"
        return ShownRow(row.id, form, why, fate, rendered.error.what, notices=rendered.notices)
    return _kept(decoded, form, why, rendered, renderer)


def _kept(example: Example, form: str, why: str, rendered: Rendered, renderer: Renderer) -> ShownRow:
    codec = renderer.codec
    raw = isinstance(example.prompt, str)
    stop_ids = (codec.eos_id,) if raw else renderer.stop_ids
    last_ids = [int(branch.ids[branch.trained][-1]) for tree in rendered.trees for branch in tree.branches]
    return ShownRow(
        id=example.id,
        format=form,
        format_reason=why,
        fate="trimmed" if rendered.trimmed else "kept",
        reason=rendered.trimmed,
        trees=tuple(_shown_tree(tree, example, codec) for tree in rendered.trees),
        notices=rendered.notices,
        terminators=tuple(_token(codec, token_id) for token_id in dict.fromkeys(last_ids)),
        stops=tuple(_token(codec, token_id) for token_id in stop_ids),
    )


def _token(codec: Codec, token_id: int) -> Token:
    return Token(token_id, codec.decode([token_id]))


def _shown_tree(tree: Tree, example: Example, codec: Codec) -> ShownTree:
    prompt_ids = [int(each) for each in tree.prompt_ids]
    judged = example if tree.label is None else replace(example, label=tree.label, scores=())
    labels = branch_labels(judged, len(tree.branches))
    branches = []
    for label, branch in zip(labels, tree.branches, strict=True):
        trained = [bool(each) for each in branch.trained]
        found = cells([int(each) for each in branch.ids], trained, codec, start=len(prompt_ids))
        branches.append(ShownBranch(label, found, sum(trained)))
    prompt = cells(prompt_ids, [False] * len(prompt_ids), codec)
    return ShownTree(tree.id, prompt, tuple(branches), len(prompt_ids))


def branch_labels(example: Example, count: int) -> list[str]:
    """What each answer is: chosen and rejected, a rank by its score, or desirable or not."""
    if example.scores:
        return [f"answer {place}, score {score:g}" for place, score in enumerate(example.scores[:count], start=1)]
    if count == 2:
        return ["chosen", "rejected"]
    if example.label is not None and count == 1:
        return ["answer, desirable" if example.label else "answer, undesirable"]
    return ["answer"] if count == 1 else [f"answer {place}" for place in range(1, count + 1)]


# --- tokens to cells


def cells(ids: Sequence[int], trained: Sequence[bool], codec: Codec, *, start: int = 0) -> tuple[Cell, ...]:
    """A cell a token; tokens that hold a part of a character each are put into one. `start` numbers the first."""
    control = [codec.num_controls((each,)) > 0 for each in ids]
    groups: list[tuple[int, int, str]] = []  # place, number of tokens, text
    place = 0
    while place < len(ids):
        most = 1
        while most < LONGEST_CHARACTER and place + most < len(ids) and not control[place]:
            if control[place + most] or trained[place + most] != trained[place]:
                break
            most += 1
        count, text = _character(ids[place : place + most], codec, continues=place + start > 0)
        groups.append((place, count, text))
        place += count
    kinds = [(trained[at], control[at]) for at, _, _ in groups]
    found = tuple(
        Cell(
            text,
            visible(text, _beside(groups, kinds, each, -1), _beside(groups, kinds, each, 1)),
            tuple(ids[at : at + count]),
            start + at,
            *kinds[each],
        )
        for each, (at, count, text) in enumerate(groups)
    )
    return _without_secrets(found)


def _without_secrets(found: tuple[Cell, ...]) -> tuple[Cell, ...]:
    """A placeholder in the first cell of a secret, nothing in its others; no id, since ids can be decoded. What is
    trained is not changed by it."""
    spans = secret_spans("".join(cell.text for cell in found))
    if not spans:
        return found
    clean: list[Cell] = []
    end = 0
    for cell in found:
        start, end = end, end + len(cell.text)
        inside = [span for span in spans if span[0] < end and start < span[1]]
        mark = "".join(span[2] for span in inside if span[0] >= start)
        clean.append(replace(cell, text=mark, shown=mark, ids=(0,) * len(cell.ids)) if inside else cell)
    return tuple(clean)


def _beside(groups: list[tuple[int, int, str]], kinds: list[tuple[bool, bool]], place: int, step: int) -> str:
    """The character beside a cell; "" where another kind of cell begins there."""
    other = place + step
    if not 0 <= other < len(groups) or kinds[other] != kinds[place]:
        return ""
    text = groups[other][2]
    return text[:1] if step > 0 else text[-1:]


def _character(ids: Sequence[int], codec: Codec, *, continues: bool) -> tuple[int, str]:
    """How many of these tokens belong in one cell, and their text.

    A part of a character decodes to U+FFFD, until the rest of it takes that away. Where nothing does, it was
    written as such, and tokens that add no text to it are its other bytes.
    """
    alone = codec.decode(ids[:1], continues=continues)
    joined = (1, alone)
    for count in range(2, len(ids) + 1) if alone.endswith("\ufffd") else ():
        text = codec.decode(ids[:count], continues=continues)
        if not text.endswith("\ufffd") and not text.startswith(alone):
            return count, text
        if text == alone:
            joined = (count, text)
    return joined


def visible(text: str, before: str = "", after: str = "") -> str:
    """The text with white space shown where it could be overlooked, and nothing that a terminal would obey.

    Newlines are shown as ↵ (and kept), tabs as ⇥, spaces as · at an edge and beside other white space.
    `before` and `after` are the neighbouring characters; "" is an edge.
    """
    shown = []
    for place, character in enumerate(text):
        left = text[place - 1] if place else before
        right = text[place + 1] if place + 1 < len(text) else after
        shown.append(_visible(character, hidden=not left.strip() or not right.strip()))
    return "".join(shown)


def _visible(character: str, *, hidden: bool) -> str:
    if character == "\n":
        return "↵\n"
    if character == " ":
        return "·" if hidden else " "
    if character == "\t":
        return "⇥"
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)
    if character in JOINERS or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Co", "Cn", "Zs", "Zl", "Zp"):
        return character
    return f"⟨U+{code:04X}⟩"
