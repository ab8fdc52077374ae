"""Rows as a person sees them: every token once, in a colour that is true, and nothing in them that acts."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from tests.unit.data.build import CHATML, byte_tokenizer, space_tokenizer
from tunesmith.data import show
from tunesmith.data.render import Renderer
from tunesmith.data.show import NoSuchRowError, ShownRow, branch_labels, cells, is_named, pick_rows, shown_row, visible
from tunesmith.data.show_html import rows_page, tip
from tunesmith.data.show_terminal import print_rows
from tunesmith.data.template import choose_template
from tunesmith.data.tokens import Codec
from tunesmith.data.types import BadRow, Example, Message, Row
from tunesmith.recipe.models import Source

EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>{{ 7 * 7 }}"
CODEC = Codec(byte_tokenizer())


def renderer(max_length: int = 1000) -> Renderer:
    tokenizer = byte_tokenizer(template=CHATML)
    return Renderer(tokenizer, choose_template(tokenizer, None), max_length)


def shown(tmp_path: Path, *rows: object, max_length: int = 1000, name: str = "rows.jsonl") -> list[ShownRow]:
    file = tmp_path / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    picked = pick_rows(Source(path=str(file)), num_rows=len(rows))
    return [shown_row(row, picked.plan, renderer(max_length)) for row in picked.rows]


def chat(question: str, answer: str) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def plain(rows: list[ShownRow], **options: object) -> str:
    out = io.StringIO()
    print_rows(Console(file=out, width=200, **options), rows)  # type: ignore[arg-type]
    return out.getvalue()


# --- cells


def test_a_character_split_over_tokens_is_one_cell() -> None:
    ids = CODEC.encode("a🦜b").ids
    assert len(ids) == 6  # the emoji is four bytes, and this vocabulary has no token for two of them
    found = cells(ids, [True] * 6, CODEC, start=10)
    assert [cell.text for cell in found] == ["a", "🦜", "b"]
    assert [(cell.index, len(cell.ids)) for cell in found] == [(10, 1), (11, 4), (15, 1)]
    assert tip(found[1]).startswith("tokens 11 to 14 · id ")


def test_a_character_is_not_joined_across_the_mask() -> None:
    ids = CODEC.encode("🦜").ids
    found = cells(ids, [False, False, True, True], CODEC)
    assert [each for cell in found if cell.trained for each in cell.ids] == ids[2:]
    assert "🦜" not in [cell.text for cell in found]


def test_a_replacement_character_of_the_text_stays_as_it_is() -> None:
    ids = CODEC.encode("\ufffdab").ids
    assert [cell.text for cell in cells(ids, [True] * len(ids), CODEC)] == ["\ufffd", "a", "b"]


@given(st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\ufffd\ufdd0"), max_size=30), st.booleans())
@settings(max_examples=60, deadline=None)
def test_cells_are_the_text_and_the_ids(text: str, spaced: bool) -> None:
    codec = Codec(space_tokenizer()) if spaced else CODEC
    ids = codec.encode(text).ids
    found = cells(ids, [True] * len(ids), codec)
    assert [each for cell in found for each in cell.ids] == ids
    assert "".join(cell.text for cell in found) == codec.decode(ids, continues=False)


def test_white_space_is_visible_where_it_could_be_overlooked() -> None:
    assert visible(" a b  c\td\ne ") == "·a b··c⇥d↵\ne·"
    assert visible(" a", before="x") == " a"
    assert visible("\x1b[31m\u202e\u00a0\r\x7f") == "␛[31m⟨U+202E⟩⟨U+00A0⟩␍⟨U+007F⟩"
    assert visible("👩\u200d👩 می\u200cخواهم") == "👩\u200d👩 می\u200cخواهم"  # joiners belong to these


# --- rows


def test_a_row_says_what_is_trained(tmp_path: Path) -> None:
    (row,) = shown(tmp_path, chat("the name", "hello world"))
    (tree,) = row.trees
    (branch,) = tree.branches
    assert "".join(cell.text for cell in tree.prompt).endswith("the name<|im_end|>\n<|im_start|>assistant\n")
    assert "".join(cell.text for cell in branch.cells if cell.trained) == "hello world<|im_end|>"
    assert not any(cell.trained for cell in tree.prompt)
    assert [cell.text for cell in branch.cells if cell.control] == ["<|im_end|>"]
    assert (row.fate, row.format) == ("kept", "messages")
    assert row.num_trained == sum(len(cell.ids) for cell in branch.cells if cell.trained)
    assert row.num_prompt == sum(len(cell.ids) for cell in tree.prompt)
    assert [token.text for token in row.terminators] == ["<|im_end|>"]
    assert "<|im_end|>" in [token.text for token in row.stops]
    assert branch.cells[0].index == row.num_prompt


def test_a_control_token_in_content_is_shown_as_text(tmp_path: Path) -> None:
    (row,) = shown(tmp_path, chat("say <|im_end|> now", "no"))
    spelled = [cell for cell in row.trees[0].prompt if cell.control]
    assert len(spelled) == 3  # the template's own, and not the one in the question
    assert any("spells control tokens" in notice for notice in row.notices)


def test_a_pair_shows_its_prompt_once(tmp_path: Path) -> None:
    (row,) = shown(tmp_path, {"prompt": "name?", "chosen": "the town", "rejected": "the world"})
    (tree,) = row.trees
    assert [branch.label for branch in tree.branches] == ["chosen", "rejected"]
    text = plain([row])
    assert text.count("name?") == 1
    assert "⟦the town‹<|im_end|>›⟧" in text
    assert "⟦the world‹<|im_end|>›⟧" in text


def test_rows_that_are_not_trained_give_their_reason(tmp_path: Path) -> None:
    empty, role, long = shown(
        tmp_path,
        chat("name", ""),
        {"messages": [{"role": "usr", "content": "x"}]},
        chat("name", "world " * 200),
        max_length=50,
    )
    assert (empty.fate, empty.trees) == ("dropped", ())
    assert empty.facts()[0] == "dropped: empty answer"
    assert role.fate == "malformed"
    assert "usr" in role.reason
    assert long.fate == "dropped"
    assert "max_length" in long.reason
    assert "dropped: empty answer" in plain([empty])


def test_labels_of_answers() -> None:
    turns = ((Message("assistant", "a"),), (Message("assistant", "b"),))
    pair = Example("id", "sha", (Message("user", "q"),), turns)
    assert branch_labels(pair, 2) == ["chosen", "rejected"]
    ranked = Example("id", "sha", pair.prompt, turns, scores=(9.0, 2.5))
    assert branch_labels(ranked, 2) == ["answer 1, score 9", "answer 2, score 2.5"]
    unpaired = Example("id", "sha", pair.prompt, turns[:1], label=False)
    assert branch_labels(unpaired, 1) == ["answer, undesirable"]


# --- which rows


def test_no_more_rows_are_read_than_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []

    def rows(source: Source) -> Iterator[Row | BadRow]:
        for number in range(1, 10_000):
            read.append(number)
            yield Row(f"a/b.jsonl:{number}", {"question": str(number), "answer": "x"}, str(number))

    monkeypatch.setattr(show, "iter_rows", rows)
    source = Source(path="a/b.jsonl")
    assert [row.id for row in pick_rows(source, num_rows=2).rows] == ["a/b.jsonl:1", "a/b.jsonl:2"]
    assert len(read) == show.FORMAT_ROWS
    read.clear()
    assert [row.id for row in pick_rows(source, row="1500").rows] == ["a/b.jsonl:1500"]
    assert len(read) == 1500
    assert pick_rows(source, row="b.jsonl:7").rows[0].id == "a/b.jsonl:7"


def test_a_row_that_is_not_there(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(chat("a", "b")) + "\n")
    with pytest.raises(NoSuchRowError, match="no row 2: the source has 1"):
        pick_rows(Source(path=str(file)), row="2")


def test_a_row_is_named_with_or_without_its_folder() -> None:
    assert is_named("data/a.jsonl:12", "a.jsonl:12")
    assert is_named("data/a.jsonl:12", "data/a.jsonl:12")
    assert not is_named("data/a.jsonl:12", "jsonl:12")
    assert not is_named("data/a.jsonl:12", "a.jsonl:1")


# --- the two views


def test_trained_text_stands_in_brackets_without_colour(tmp_path: Path) -> None:
    rows = shown(tmp_path, chat("the name", " hello\nworld"))
    text = plain(rows)
    assert "⟦·hello↵\nworld‹<|im_end|>›⟧" in text
    assert "⟦trained⟧" in text.splitlines()[0]  # the legend
    assert "\x1b" not in text
    assert plain(rows, force_terminal=True, no_color=True).count("⟦") == text.count("⟦")


def test_trained_text_is_coloured_in_a_terminal(tmp_path: Path) -> None:
    text = plain(shown(tmp_path, chat("the name", "hello")), force_terminal=True, color_system="256")
    assert "⟦" not in text
    assert "\x1b[30;48;5;" in text


def test_a_row_cannot_steer_the_terminal(tmp_path: Path) -> None:
    text = plain(shown(tmp_path, chat("\x1b]0;owned\x07 [bold]x[/bold]", "\x1b[2Jgone \x9b1m")))
    assert not set(text) & {"\x1b", "\x07", "\x9b"}
    assert "[bold]x[/bold]" in text
    quoted = ShownRow("\x1b[2J.jsonl:1", "text", "why", "malformed", "text: found \x9b1m; wanted a string")
    assert not set(plain([quoted])) & {"\x1b", "\x9b"}


def test_an_ascii_terminal_gets_ascii(tmp_path: Path) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    print_rows(Console(file=out, width=200), shown(tmp_path, chat("name\n", " hello")))
    out.flush()
    text = out.buffer.getvalue().decode("ascii")  # type: ignore[attr-defined]
    assert "[[ hello{{<|im_end|>}}]]" in text


class Tags(HTMLParser):
    """Every tag and the text of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_nothing_in_a_page_runs(tmp_path: Path) -> None:
    """TRAPS S14: markup in any field is shown as text."""
    name = "<script>x<b>.jsonl"
    rows = shown(
        tmp_path,
        chat(EVIL, EVIL),
        {"messages": [{"role": EVIL, "content": EVIL}]},
        chat(EVIL, ""),
        name=name.replace("/", ""),
    )
    page = Tags()
    text = rows_page(rows, title=EVIL, facts=[EVIL])
    page.feed(text)
    assert not set(page.tags) & {"script", "img", "b", "iframe", "object", "link", "a", "form"}
    assert not {each for each in page.attributes if each.startswith("on") or each in ("src", "href", "style")}
    assert EVIL in page.text  # the title, as it stands
    assert EVIL in "".join(page.text).replace("·", " ")
    assert "default-src 'none'; style-src 'unsafe-inline'" in text
    assert "http" not in text.replace("http-equiv", "")


def test_a_page_of_a_pair_has_its_answers_side_by_side(tmp_path: Path) -> None:
    rows = shown(tmp_path, {"prompt": "name?", "chosen": "the town", "rejected": "the world"})
    page = rows_page(rows, title="pairs", facts=["a fact"])
    assert page.count('<div class="answer">') == 2
    assert page.count('<div class="answers">') == 1
    assert "<li>a fact</li>" in page
    assert f'data-tip="token {rows[0].num_prompt} · id ' in page
