"""`tunesmith data`: what each command shows and writes, and what it refuses."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

from tests.unit.data.build import CHATML, byte_tokenizer
from tunesmith.cli.main import main
from tunesmith.data.formats import FORMATS, decode_row, plan_format
from tunesmith.data.types import Example, Row
from tunesmith.recipe.models import Model, Source

RECIPE = """\
name: demo
model: {path: base}
stages:
  - {name: sft, method: sft, train: [{path: a.jsonl}], heldout: [{path: b.jsonl}], max_length: 40}
  - {name: dpo, method: dpo, train: [{path: pairs.jsonl}, {path: more.jsonl}]}
"""


@dataclass(frozen=True)
class Outcome:
    """What one call of the command printed and ended with."""

    code: int
    out: str
    err: str


def write_rows(name: str, *rows: object) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Outcome]:
    """The command in a folder with a recipe and rows; its tokenizer is a tiny one, and `asked` says which was meant."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    Path("recipe.yaml").write_text(RECIPE, encoding="utf-8")
    write_rows("a.jsonl", *({"question": f"q{number}", "answer": f"a{number}"} for number in range(1, 6)))
    write_rows("b.jsonl", {"question": "held", "answer": "out " * 60})
    write_rows("pairs.jsonl", {"prompt": "p", "chosen": "yes", "rejected": "no"})
    write_rows("more.jsonl", {"prompt": "p", "chosen": "aye", "rejected": "nay"})

    @dataclass
    class Added:
        note: str = ""

    def load_extended_tokenizer(model: Model) -> tuple[object, Added]:
        return byte_tokenizer(template=CHATML), Added()

    loader = ModuleType("tunesmith.model.load")
    vars(loader).update(load_extended_tokenizer=load_extended_tokenizer, load_tokenizer=None)
    monkeypatch.setitem(sys.modules, "tunesmith.model.load", loader)

    def call(*words: str) -> Outcome:
        with pytest.raises(SystemExit) as ended:
            main(("data", *words))
        captured = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Outcome(ended.value.code, captured.out, captured.err)

    return call


def ids(outcome: Outcome) -> list[str]:
    """Rows and fates as their heads name them."""
    return [line.removeprefix("--- ") for line in outcome.out.splitlines() if line.startswith("--- ")]


# --- show


def test_show_of_a_file_names_the_tokenizer_it_took(command: Callable[..., Outcome]) -> None:
    shown = command("show", "a.jsonl")
    assert shown.code == 0, shown.err
    assert ids(shown) == ["a.jsonl:1  kept", "a.jsonl:2  kept", "a.jsonl:3  kept"]
    assert "No --model given" in shown.out
    assert "⟦a1‹<|im_end|>›⟧" in shown.out
    assert "format question_answer: 5 of 5 rows have `question` and `answer`" in shown.out
    named = command("show", "a.jsonl", "--model", "mine", "--num-rows", "1")
    assert "No --model given" not in named.out
    assert "tokenizer of mine" in named.out
    assert len(ids(named)) == 1


def test_show_takes_one_row_by_number_or_id(command: Callable[..., Outcome]) -> None:
    assert ids(command("show", "a.jsonl", "--row", "4")) == ["a.jsonl:4  kept"]
    assert ids(command("show", "a.jsonl", "--row", "a.jsonl:5")) == ["a.jsonl:5  kept"]
    wrong = command("show", "a.jsonl", "--row", "9")
    assert wrong.code == 2
    assert "a.jsonl: no row 9: the source has 5" in wrong.err


def test_show_of_a_recipe_renders_as_its_stage_would(command: Callable[..., Outcome]) -> None:
    shown = command("show", "recipe.yaml", "--num-rows", "1")
    assert ids(shown) == ["a.jsonl:1  kept"]
    assert "recipe demo, stage sft (sft); its stages: sft, dpo" in shown.out
    assert "max_length 40, too_long drop, train_on assistant" in shown.out
    held = command("show", "recipe.yaml", "--row", "b.jsonl:1")  # a held-out row, longer than the stage allows
    assert ids(held) == ["b.jsonl:1  dropped"]
    assert "longer than max_length" in held.out


def test_show_of_a_stage_with_several_sources(command: Callable[..., Outcome]) -> None:
    shown = command("show", "recipe.yaml", "--stage", "dpo", "--num-rows", "1")
    assert ids(shown) == ["pairs.jsonl:1  kept", "more.jsonl:1  kept"]
    assert ids(command("show", "recipe.yaml", "--stage", "dpo", "--row", "more.jsonl:1")) == ["more.jsonl:1  kept"]
    unclear = command("show", "recipe.yaml", "--stage", "dpo", "--row", "1")
    assert unclear.code == 2
    assert "the stage has 2 sources, so row 1 could be of each" in unclear.err


def test_show_refuses_a_stage_that_is_not_there(command: Callable[..., Outcome]) -> None:
    wrong = command("show", "recipe.yaml", "--stage", "sfd")
    assert wrong.code == 2
    assert "the recipe has no stage 'sfd'" in wrong.err
    assert "Its stages: sft, dpo." in wrong.err
    nowhere = command("show", "a.jsonl", "--stage", "sft")
    assert nowhere.code == 2
    assert "--stage names a stage of a recipe" in nowhere.err


def test_show_shows_malformed_rows_and_goes_on(command: Callable[..., Outcome]) -> None:
    write_rows("c.jsonl", {"question": "q", "answer": 3}, {"question": "q", "answer": "a"})
    with Path("c.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"question": "cut\n')
    shown = command("show", "c.jsonl")
    assert shown.code == 0, shown.err
    assert ids(shown) == ["c.jsonl:1  malformed", "c.jsonl:2  kept", "c.jsonl:3  malformed"]
    assert "answer: found 3; wanted a string" in shown.out


def test_show_writes_a_page(command: Callable[..., Outcome]) -> None:
    shown = command("show", "a.jsonl", "--html", "page.html")
    assert shown.code == 0, shown.err
    assert "The page is page.html." in shown.out
    page = Path("page.html").read_text(encoding="utf-8")
    assert page.count("<article>") == 3
    assert "Content-Security-Policy" in page


def test_show_of_a_missing_file(command: Callable[..., Outcome]) -> None:
    shown = command("show", "nothing.jsonl")
    assert shown.code == 2
    assert "nothing.jsonl: no such file" in shown.err
    assert "Traceback" not in shown.err


@pytest.mark.parametrize("word", ["show", "audit", "fix", "diff"])
def test_every_command_has_its_help(command: Callable[..., Outcome], word: str) -> None:
    assert command(word, "--help").out.startswith("Usage: tunesmith data " + word)


# --- audit


def test_audit_ends_with_2_only_at_a_blocker(command: Callable[..., Outcome]) -> None:
    write_rows("clean.jsonl", {"question": "What is a heron?", "answer": "A bird that stands in water."})
    clean = command("audit", "clean.jsonl")
    assert clean.code == 0, clean.err
    assert "0 blockers" in clean.out
    repeated = [{"question": "What is a heron?", "answer": "A bird that stands in water."}] * 2
    write_rows("repeated.jsonl", *repeated)
    assert command("audit", "repeated.jsonl").code in (0, 2)  # how grave a repetition is, is the audit's to say
    leaked = command("audit", "clean.jsonl", "--heldout", "repeated.jsonl")
    assert leaked.code == 2
    assert "leakage" in leaked.out


def test_audit_prints_a_command_that_works(command: Callable[..., Outcome]) -> None:
    name = "a-file-whose-name-is-longer-than-the-page-is-wide-" + "x" * 80 + ".jsonl"
    row = {"question": "What is a heron?", "answer": "A bird that stands in water."}
    write_rows(name, row, row, {"question": "And a stork?", "answer": "Another bird, on a roof."})
    shown = command("audit", name)
    lines = shown.out.replace("\\\n", " ").splitlines()  # as a shell reads lines that go on
    (line,) = [line.strip() for line in lines if line.strip().startswith("tunesmith data fix")]
    fixed = command(*line.split()[2:])
    assert fixed.code == 0, fixed.err
    assert "3 rows read, 1 dropped" in fixed.out
    assert command("audit", line.split()[-1]).code == 0


def test_audit_writes_a_page_and_json(command: Callable[..., Outcome]) -> None:
    shown = command("audit", "a.jsonl", "--against", "b.jsonl", "--html", "audit.html", "--json", "audit.json")
    assert shown.code in (0, 2), shown.err
    assert "Content-Security-Policy" in Path("audit.html").read_text(encoding="utf-8")
    assert json.loads(Path("audit.json").read_text(encoding="utf-8"))["title"] == "a.jsonl"


def test_audit_counts_tokens_where_there_is_a_model(command: Callable[..., Outcome]) -> None:
    assert "over-long" not in command("audit", "b.jsonl").out
    assert "over-long" in command("audit", "b.jsonl", "--model", "mine", "--max-length", "50").out


def test_audit_of_a_recipe_looks_at_every_stage(command: Callable[..., Outcome]) -> None:
    shown = command("audit", "recipe.yaml")
    assert "stage sft (sft)" in shown.out
    assert "stage dpo (dpo)" in shown.out
    wrong = command("audit", "recipe.yaml", "--heldout", "b.jsonl")
    assert wrong.code == 2
    assert "a recipe's stages name their own held-out rows" in wrong.err


# --- fix


def test_fix_writes_a_copy_with_its_lineage(command: Callable[..., Outcome]) -> None:
    row = {"question": "What is a heron?", "answer": "Ask heron@example.org, who knows."}
    write_rows("dirty.jsonl", row, row, {"question": "q", "answer": ""})
    before = Path("dirty.jsonl").read_bytes()
    shown = command("fix", "dirty.jsonl", "--drop", "duplicates,empty", "--mask", "-o", "clean.jsonl")
    assert shown.code == 0, shown.err
    assert "3 rows read, 2 dropped, 1 masked, 1 written to clean.jsonl" in shown.out
    assert "heron@example.org" not in Path("clean.jsonl").read_text(encoding="utf-8")
    assert json.loads(Path("clean.jsonl.lineage.json").read_text(encoding="utf-8"))["drop"] == ["duplicates", "empty"]
    assert Path("dirty.jsonl").read_bytes() == before


def test_fix_needs_an_output_and_something_to_do(command: Callable[..., Outcome]) -> None:
    assert "Missing option '-o'" in command("fix", "a.jsonl", "--drop", "duplicates").err
    nothing = command("fix", "a.jsonl", "-o", "out.jsonl")
    assert nothing.code == 2
    unknown = command("fix", "a.jsonl", "--drop", "ugly", "-o", "out.jsonl")
    assert unknown.code == 2
    assert "'ugly' cannot be dropped" in unknown.err
    assert not Path("out.jsonl").exists()


# --- diff


def test_diff_of_two_files(command: Callable[..., Outcome]) -> None:
    write_rows("a2.jsonl", *({"question": f"q{number}", "answer": f"a{number}"} for number in range(2, 8)))
    shown = command("diff", "a.jsonl", "a2.jsonl")
    assert shown.code == 0, shown.err
    assert "4 the same" in shown.out
    assert "2 added, 1 removed" in shown.out
    assert "a2.jsonl:6" in shown.out
    assert "The rows are the same." in command("diff", "a.jsonl", "a.jsonl").out


def test_diff_of_a_run_and_a_file(command: Callable[..., Outcome]) -> None:
    Path("run").mkdir()
    Path("run/ledger.parquet").write_bytes(b"")
    shown = command("diff", "run", "a.jsonl")
    assert shown.code == 2
    assert "ledger" in shown.err


# --- docs/data.md

GUIDE = Path(__file__).parents[3] / "docs" / "data.md"


def test_the_guides_examples_are_in_the_formats_it_says() -> None:
    cells = re.findall(r"^\| `(\w+)` \| `(\{.*?\})`", GUIDE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(cells) == len(FORMATS)
    for name, example in cells:
        fields = json.loads(example)
        row = Row("guide", fields, "")
        plan = plan_format([row], Source(path="guide"))
        assert plan.format == name
        assert isinstance(decode_row(row, plan), Example), example


def test_the_tests_that_the_guide_names_exist() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)`", GUIDE.read_text(encoding="utf-8"))
    assert named
    assert [name for name in named if not (GUIDE.parents[1] / name).is_file()] == []
