"""The report: complete, and every text in it is text (TRAPS S14)."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.unit.comparison.build import HOSTILE, hostile_report, pair, question, recipe, record
from tunesmith.comparison.report import ledger_rows, report_html, write_report
from tunesmith.comparison.rows import Rows
from tunesmith.comparison.summary import answered, summarize
from tunesmith.data.ledger import Ledger, LedgerEntry
from tunesmith.runs.folder import create_or_open
from tunesmith.runs.records import append_record


class Elements(HTMLParser):
    """Collects what a browser would build."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture
def hostile(tmp_path: Path) -> str:
    return report_html(*hostile_report(tmp_path))


def test_no_text_becomes_markup(hostile: str) -> None:
    page = Elements(hostile)
    assert page.open == []
    found = {tag for tag, _ in page.tags}
    assert not found & {"script", "img", "iframe", "object", "embed", "link", "base", "form", "input", "foreignobject"}
    attributes = {(name, value) for _, attrs in page.tags for name, value in attrs.items()}
    assert not [name for name, _ in attributes if name.startswith("on") or name in ("src", "action", "xlink:href")]
    assert all(value is not None and value.startswith("#") for name, value in attributes if name == "href")
    assert "url(" not in hostile and "@import" not in hostile
    assert "{{ 7*7 }}" in hostile  # a template in a text is text as well


def test_hostile_texts_are_shown_as_they_are(hostile: str) -> None:
    shown = "".join(Elements(hostile).text)
    # title, heading, model, style, stage names, verdict, notes, prompts, answers, accepted, ledger, recipe, versions
    assert shown.count("<script>document.title='CANARY'</script>") >= 20


def test_the_policy_forbids_everything_but_inline_style(hostile: str) -> None:
    policies = [attrs for tag, attrs in Elements(hostile).tags if tag == "meta" and "http-equiv" in attrs]
    assert policies[0]["content"] == (
        "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    )


def test_ids_are_unique_and_every_link_has_its_target(hostile: str) -> None:
    tags = Elements(hostile).tags
    ids = [attrs["id"] for _, attrs in tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    wanted = {value.removeprefix("#") for _, attrs in tags if (value := attrs.get("href"))}
    wanted |= {value for _, attrs in tags if (value := attrs.get("aria-labelledby"))}
    assert wanted <= set(ids)


def test_half_a_surrogate_pair_does_not_stop_the_report(tmp_path: Path) -> None:
    folder, trial, summary, answers = hostile_report(tmp_path)
    name = trial.model.model_copy(update={"path": "model-\udcff"})
    path = write_report(folder, trial.model_copy(update={"model": name}), summary, answers)
    assert "model-\\udcff" in path.read_text("utf-8")


def test_a_bare_run_still_has_a_report(tmp_path: Path) -> None:
    folder = create_or_open(tmp_path, "bare")
    trial = recipe("bare")
    rows = Rows([], [], no_questions="no prompts here", no_pairs="no pairs here")
    records = [record("base", []), record("sft", [])]
    summary = summarize(trial, records, rows, reference="base")
    html = report_html(folder, trial, summary, answered(trial.compare, records, rows))
    assert "Exact answers: not measured, no prompts here." in html
    assert "The run has no recorded steps." in html
    assert 'id="answers"' not in html and 'id="data"' not in html


def test_warnings_stand_under_the_curves(tmp_path: Path) -> None:
    """As text: a row's id in them is no markup."""
    folder, trial, summary, answers = hostile_report(tmp_path)
    path = folder.stage("sft").warnings_path
    path.parent.mkdir(parents=True, exist_ok=True)
    causes = ["rows unlike the others", "a learning rate that is too high"]
    append_record(path, {"step": 7, "kind": "loss spike", "text": "the loss is <b>30</b>", "causes": causes})
    append_record(path, {"step": 9, "kind": "left out", "text": "no update was made.", "causes": []})
    append_record(folder.stage("sft").metrics_path, {"step": 1, "loss": 1.0, "lr": 1.0, "grad_norm": 1.0})
    html = report_html(folder, trial, summary, answers)
    assert "Step 7: the loss is &lt;b&gt;30&lt;/b&gt;. Possible causes: rows unlike the others; a learning rate" in html
    assert "Step 9: no update was made.</p>" in html


def test_the_first_prompts_are_shown_and_no_more(tmp_path: Path) -> None:
    folder = create_or_open(tmp_path, "trial")
    trial = recipe()
    trial = trial.model_copy(update={"compare": trial.compare.model_copy(update={"num_shown": 2})})
    rows = Rows([question(name) for name in "abc"], [pair("p")])
    records = [record(name, ["yes", "no", "yes"], pairs=[(-1, -2)]) for name in ("base", "sft", "dpo")]
    summary = summarize(trial, records, rows, reference="sft")
    html = report_html(folder, trial, summary, answered(trial.compare, records, rows))
    assert "prompt a" in html and "prompt b" in html and "prompt c" not in html
    assert html.count("✓ exact") == 3 and html.count("✗ not exact") == 3
    assert "2 prompts of the held-out data" in html


def test_the_ledger_adds_up() -> None:
    def entry(outcome: str, reason: str = "") -> LedgerEntry:
        return LedgerEntry("r", "s", "sft", "train", "f", outcome, reason, 9, 3, 7)  # type: ignore[arg-type]

    dropped = [entry("dropped", "too long: 9 > 8"), entry("dropped", "too long: 8 > 7")]
    (row,) = ledger_rows(Ledger([entry("kept"), *dropped, entry("kept"), entry("merged", "repeats")]).summary())
    assert (row.kept, row.trimmed, row.merged, row.dropped, row.trained_tokens) == (2, 0, 1, 2, 35)
    assert row.reasons == (("too long", 2), ("repeats", 1))


def test_the_hostile_text_has_what_the_trap_names() -> None:
    for piece in ("<script>", "onerror", "javascript:", "</script>", "![](http"):
        assert piece in HOSTILE
