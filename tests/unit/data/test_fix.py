from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.data.fix import DROPPABLE, fix_source
from tunesmith.data.sources import content_sha, read_rows
from tunesmith.errors import DataError
from tunesmith.recipe.models import Source

Fields = dict[str, object]


def write(path: Path, rows: list[Fields]) -> Source:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(path=str(path))


def ask(question: str, answer: str, **more: object) -> Fields:
    return {"question": question, "answer": answer, **more}


def clean(count: int) -> list[Fields]:
    return [
        ask(f"What is on page {n}?", f"{n} geese and {n + 3} cats.", note=n / 7, z={"b": 1, "a": [None]})
        for n in range(count)
    ]


def read(path: Path) -> list[Fields]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_duplicates_go_and_the_rest_is_byte_for_byte_the_same(tmp_path: Path) -> None:
    rows = clean(4)
    source = write(tmp_path / "rows.jsonl", [*rows, rows[1], rows[1]])
    before = (tmp_path / "rows.jsonl").read_bytes()
    report = fix_source(source, out=tmp_path / "clean.jsonl", drop=["duplicates"])
    assert read(report.out) == rows
    assert list(read(report.out)[0]) == ["question", "answer", "note", "z"]  # keys in the file's order
    assert [row.sha for row in read_rows(Source(path=str(report.out)))] == [row.sha for row in read_rows(source)[:4]]
    assert (report.num_read, report.num_written, report.num_dropped, report.counts) == (6, 4, 2, {"duplicates": 2})
    assert (tmp_path / "rows.jsonl").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clean.jsonl", "clean.jsonl.lineage.json", "rows.jsonl"]


def test_the_lineage_tells_it_all_and_holds_no_row(tmp_path: Path) -> None:
    canary = "canary@example.org"
    source = write(tmp_path / "rows.jsonl", [*clean(2), ask("Who?", f"Mail {canary}."), ask("I?", "I am {{name}}.")])
    report = fix_source(source, out=tmp_path / "c.jsonl", drop=["personal-data", "placeholders"])
    text = report.lineage.read_text()
    account = json.loads(text)
    assert canary not in text
    assert account["rows"] == [
        {"id": f"{source.path}:3", "sha": content_sha(ask("Who?", f"Mail {canary}.")), "action": "dropped",
         "reason": "personal-data"},
        {"id": f"{source.path}:4", "sha": content_sha(ask("I?", "I am {{name}}.")), "action": "dropped",
         "reason": "placeholders"},
    ]  # fmt: skip
    assert account["output"]["sha256"] == hashlib.sha256(report.out.read_bytes()).hexdigest()
    found = hashlib.sha256((tmp_path / "rows.jsonl").read_bytes()).hexdigest()
    assert account["input"]["files"][0]["sha256"] == found
    assert account["input"]["num_rows"] - len(account["rows"]) == account["output"]["num_rows"] == 2
    assert account["tool"].startswith("tunesmith ")


def test_masking_keeps_the_rows_and_touches_every_field(tmp_path: Path) -> None:
    rows = [ask("Who?", "Mail a@b.org.", meta={"by": ["c@d.org", 5]}), *clean(1)]
    report = fix_source(write(tmp_path / "rows.jsonl", rows), out=tmp_path / "c.jsonl", masked=True)
    assert read(report.out)[0] == ask("Who?", "Mail [EMAIL].", meta={"by": ["[EMAIL]", 5]})
    assert read(report.out)[1] == clean(1)[0]
    (change,) = report.changes
    assert (change.action, change.new_sha) == ("masked", content_sha(read(report.out)[0]))
    assert report.num_masked == 1


def test_the_source_and_other_files_are_never_written_over(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [*clean(2), *clean(1)])
    with pytest.raises(DataError, match="its own source"):
        fix_source(source, out=tmp_path / "rows.jsonl", drop=["duplicates"])
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match="its own source"):
        fix_source(source, out=tmp_path / "link.jsonl", drop=["duplicates"])
    (tmp_path / "other.jsonl").write_text("precious")
    with pytest.raises(DataError, match="there already"):
        fix_source(source, out=tmp_path / "other.jsonl", drop=["duplicates"])
    assert (tmp_path / "other.jsonl").read_text() == "precious"
    assert not (tmp_path / "other.jsonl.lineage.json").exists()


def test_a_second_call_with_the_same_result_is_fine(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [*clean(2), *clean(1)])
    first = fix_source(source, out=tmp_path / "c.jsonl", drop=["duplicates"])
    assert fix_source(source, out=tmp_path / "c.jsonl", drop=["duplicates"]) == first
    with pytest.raises(DataError, match="there already"):
        fix_source(source, out=tmp_path / "c.jsonl", drop=["duplicates"], masked=True)  # another lineage


def test_a_first_row_that_goes_for_another_reason_leaves_its_copy(tmp_path: Path) -> None:
    long = " ".join(f"word{n}" for n in range(40))
    rows = [ask("Tell.", f"{long} {{{{name}}}}"), ask("Tell.", long), ask("Tell.", f"{long} end")]
    report = fix_source(
        write(tmp_path / "r.jsonl", rows), out=tmp_path / "c.jsonl", drop=["near-duplicates", "placeholders"]
    )
    assert read(report.out) == [rows[1]]


def test_unreadable_rows_must_be_dropped_by_name(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", clean(3))
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write("{broken\n")
    with pytest.raises(DataError, match="cannot be copied"):
        fix_source(source, out=tmp_path / "c.jsonl", drop=["duplicates"])
    report = fix_source(source, out=tmp_path / "c.jsonl", drop=["bad-rows"])
    assert (report.num_written, report.counts) == (3, {"bad-rows": 1})


def test_leakage_against_held_out_rows(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [*clean(4), clean(1)[0] | {"answer": "Other."}])
    held = write(tmp_path / "held.jsonl", [ask("What is on page 0?", "Nothing.")])
    report = fix_source(source, out=tmp_path / "c.jsonl", drop=["leakage"], against=[held])
    assert [row["question"] for row in read(report.out)] == [f"What is on page {n}?" for n in (1, 2, 3)]
    with pytest.raises(DataError, match="judged against"):
        fix_source(source, out=tmp_path / "d.jsonl", drop=["leakage"])


def test_pairs_and_renamed_columns_keep_the_files_own_names(tmp_path: Path) -> None:
    rows: list[Fields] = [
        {"q": "Why?", "good": "A.", "bad": "A."},
        {"q": "Why?", "good": "A.", "bad": "B."},
        {"q": "Why?", "good": "B.", "bad": "A."},
        {"q": "Who?", "good": "A.", "bad": "B."},
    ]
    source = write(tmp_path / "r.jsonl", rows)
    source = Source(path=source.path, columns={"prompt": "q", "chosen": "good", "rejected": "bad"})
    report = fix_source(source, out=tmp_path / "c.jsonl", drop=["equal-pairs", "contradictions"])
    assert read(report.out) == [rows[3]]
    assert report.counts == {"equal-pairs": 1, "contradictions": 2}


def test_orders_that_make_no_sense(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [ask("I?", "I am {{name}}.")])
    with pytest.raises(DataError, match="'spam' cannot be dropped"):
        fix_source(source, out=tmp_path / "c.jsonl", drop=["spam"])
    with pytest.raises(DataError, match="nothing to mend"):
        fix_source(source, out=tmp_path / "c.jsonl")
    with pytest.raises(DataError, match="would be dropped"):
        fix_source(source, out=tmp_path / "c.jsonl", drop=["placeholders"])
    assert not (tmp_path / "c.jsonl").exists()


@settings(max_examples=8, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.text(st.characters(codec="utf-8"), max_size=8)), min_size=1, max_size=10
    )
)
def test_rows_read_are_rows_written_and_dropped(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]]
) -> None:
    folder = tmp_path_factory.mktemp("fix")
    fields = [ask(f"What of {letter}?", f"Answer {text}") for letter, text in rows]
    kinds = [kind for kind in DROPPABLE if kind not in ("leakage", "answer-language", "repeated-prompts")]
    report = fix_source(write(folder / "rows.jsonl", fields), out=folder / "c.jsonl", drop=kinds)
    assert report.num_read == len(rows) == report.num_written + report.num_dropped
    kept = {content_sha(row) for row in read_back(report.out)}
    assert kept <= {content_sha(row) for row in fields}  # type: ignore[arg-type]


def read_back(path: Path) -> list[dict[str, object]]:
    return [dict(row.fields) for row in read_rows(Source(path=str(path)))]
