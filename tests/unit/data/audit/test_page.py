from __future__ import annotations

import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

from rich.console import Console

from tests.unit.data.audit.rows import clean, sft
from tunesmith.data.audit import Audit, Fact, Finding, Hit, Part, audit_examples, write_html
from tunesmith.data.audit.findings import Mend, clean_name, fix_commands
from tunesmith.data.audit.page import audit_html
from tunesmith.data.audit.table import broken_command

ATTACKS = [
    "<script>alert(1)</script>",
    "</style></title><img src=x onerror=alert(1)>",
    "![x](http://c/?q=) javascript:alert(1)",
    "\"'><svg onload=alert(1)>",
    "{{ 7 * 7 }}{% raw %}",
]


class Tags(HTMLParser):
    """Every tag of a page with its attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def hostile(text: str) -> Audit:
    """An audit that holds the text in every field."""
    finding = Finding(
        text, text, "warning", 1, 1, (text,), text, (Mend(text, text), Mend("b", "c")), text, (Hit(text, text),)
    )
    advice = replace(finding, mends=(Mend("x", text),), severity="blocker")
    return Audit(text, tuple(Part(text, 1, (Fact(text, text),), (finding, advice), (text,)) for _ in range(2)))


def test_every_field_is_text_on_the_page() -> None:
    harmless = Tags()
    harmless.feed(audit_html(hostile("harmless")))
    for attack in ATTACKS:
        page, tags = audit_html(hostile(attack)), Tags()
        tags.feed(page)
        assert "<" not in attack or attack not in page  # without markup it may stand as it is
        assert tags.found == harmless.found  # the attack added no tag and no attribute
    names = {tag for tag, _ in harmless.found}
    assert not names & {"script", "img", "iframe", "object", "link", "form", "svg", "a", "base"}


def test_the_page_loads_and_runs_nothing() -> None:
    page = audit_html(audit_examples(clean(3)))
    assert "default-src 'none'; style-src 'unsafe-inline'" in page
    assert not re.search(r"https?://|url\(|@import|\bsrc=|\bhref=|\son\w+=", page)


def test_rows_with_hostile_and_private_text_end_to_end(tmp_path: Path) -> None:
    canary = "canary@example.org"
    answer = f"As an AI language model {ATTACKS[0]} write to {canary} \x1b[31m {{{{name}}}} hf_" + "A" * 20
    audit = audit_examples([*clean(3), sft(3, f"Who? {ATTACKS[1]}", answer)], title="rows")
    write_html(audit, tmp_path / "audit.html")
    page = (tmp_path / "audit.html").read_text()
    screen = io.StringIO()
    Console(file=screen, width=100, force_terminal=False).print(audit)
    for shown in (page, screen.getvalue(), "".join(audit.jsonl())):
        assert canary not in shown and "hf_AAA" not in shown and "\x1b[31m" not in shown
        assert "[EMAIL]" in shown
    assert "<script>alert" not in page and "&lt;script&gt;" in page


def test_markup_of_the_terminal_is_text() -> None:
    screen = io.StringIO()
    Console(file=screen, width=90).print(hostile("[bold]x[/bold] [/oops]"))
    assert "[bold]x[/bold] [/oops]" in screen.getvalue()


def test_excerpts_do_not_cut_a_secret_in_half() -> None:
    answer = "As an AI language model " + "x" * 80 + " canary@example.org"  # the mail stands across the 110th character
    audit = audit_examples([sft(0, "?", answer)])
    assert "canary" not in str(audit)


def test_commands() -> None:
    mends = [
        Mend("a b.jsonl.gz", "--drop x"),
        Mend("c.json", "--drop x"),
        Mend("a b.jsonl.gz", "--mask"),
        Mend("c.json", "--drop x"),
    ]
    assert fix_commands(mends) == [
        "tunesmith data fix 'a b.jsonl.gz' --drop x --mask -o 'a b.clean.jsonl'",
        "tunesmith data fix c.json --drop x -o c.clean.jsonl",
    ]
    assert [clean_name(path) for path in ("x/y.jsonl.zst", "x/*.parquet", "folder/")] == [
        "x/y.clean.jsonl", "x/_.clean.jsonl", "folder.clean.jsonl"
    ]  # fmt: skip


def test_long_commands_are_broken_as_a_shell_reads_them() -> None:
    command = "tunesmith data fix a.jsonl --drop duplicates --drop boilerplate -o a.clean.jsonl"
    lines = broken_command(command, 50)
    assert all(len(line) <= 52 for line in lines) and len(lines) > 1
    assert " ".join(line.removesuffix("\\").strip() for line in lines) == command
