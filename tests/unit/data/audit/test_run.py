from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.unit.data.audit.rows import clean, pair, sft
from tunesmith.data.audit import Audit, audit_examples, audit_recipe, audit_source
from tunesmith.data.audit.checks import CHECKS
from tunesmith.data.audit.findings import SEVERITIES
from tunesmith.errors import DataError
from tunesmith.recipe.models import Compare, Model, Recipe, SftStage, Source

SHARED = Path(__file__).parents[4] / ".." / "shared" / "data"
needs_data = pytest.mark.skipif(not SHARED.exists(), reason="needs the real files in ../shared/data")


def write(path: Path, rows: list[dict[str, object]]) -> Source:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(path=str(path))


def questions(count: int, first: int = 0) -> list[dict[str, object]]:
    return [
        {"question": f"What is on page {n}?", "answer": f"{n} geese and {n + 3} cats."} for n in range(first, count)
    ]


def counts(audit: Audit) -> dict[str, int]:
    return {finding.kind: finding.count for finding in audit.findings}


def test_clean_rows_have_no_finding_and_every_check_that_applies_passed() -> None:
    audit = audit_examples(clean(30))
    assert audit.findings == ()
    assert not audit.has_blockers
    skipped = {"leakage", "truncation", "contradictions", "equal-pairs", "early-divergence", "length-bias", "labels"}
    assert len(audit.parts[0].passed) == len(CHECKS) - len(skipped)


def test_no_rows_at_all() -> None:
    assert audit_examples([]).findings == ()


def test_findings_are_ordered_by_severity_and_counts_add_up() -> None:
    rows = [
        *clean(20),
        sft(20, "?", "hf_" + "AbCdEfGhIjKlMnOpQrSt"),
        pair(21, "Why?", "A", "B"),
        pair(22, "Why?", "B", "A"),
    ]
    audit = audit_examples(rows, heldout=clean(2))
    severities = [SEVERITIES.index(finding.severity) for finding in audit.findings]
    assert severities == sorted(severities)
    assert {"secrets", "contradictions", "leakage"} <= set(counts(audit))
    for finding in audit.findings:
        assert finding.count == len(finding.ids) <= finding.total
        assert len(finding.shown) <= 10
    assert sum(audit.count(severity) for severity in SEVERITIES) == len(audit.findings)
    assert json.loads(json.dumps(audit.to_json()))["parts"][0]["num_rows"] == 23
    assert len(list(audit.jsonl())) == len(audit.findings)


def test_a_file_with_bad_rows_names_them_all(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [*questions(9), {"question": "Secret?", "answer": 7}])
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write("{broken\n")
    audit = audit_source(source)
    found = audit.parts[0].findings[0]
    assert (found.kind, found.severity, found.count, found.total) == ("bad-rows", "blocker", 2, 11)
    assert audit.num_rows == 11
    assert "--drop bad-rows" in found.fix


def test_truncation_needs_a_measure(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", questions(10))
    audit = audit_source(source, measure=lambda rows: [len(row.id) for row in rows], max_length=1)
    assert counts(audit)["truncation"] == 10
    assert "truncation" not in counts(audit_source(source))


def test_a_source_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        audit_source(Source(path=str(tmp_path / "none.jsonl")))


def test_a_recipe_is_audited_stage_by_stage_and_commands_name_the_right_file(tmp_path: Path) -> None:
    one = write(tmp_path / "one.jsonl", questions(10))
    two = write(tmp_path / "two.jsonl", [*questions(30, 10), questions(30)[-1]])
    held = write(tmp_path / "held.jsonl", questions(12, 10))
    first = SftStage(name="sft", train=[one, two], heldout=[held])
    second = SftStage(name="more", train=[one], heldout_fraction=0.5)
    recipe = Recipe(name="demo", model=Model(path="x"), stages=[first, second], compare=Compare())
    audit = audit_recipe(recipe)
    assert [part.name for part in audit.parts] == ["stage sft (sft)", "stage more (sft)"]
    found = {finding.kind: finding for finding in audit.parts[0].findings}
    assert found["leakage"].count == 2
    assert [mend.path for mend in found["leakage"].mends] == [two.path]
    assert found["duplicates"].fix.startswith(f"tunesmith data fix {two.path} --drop duplicates")
    options = f"--drop leakage --against {held.path} --drop duplicates"
    assert audit.parts[0].commands == [f"tunesmith data fix {two.path} {options} -o {tmp_path}/two.clean.jsonl"]
    facts = {fact.name: fact.value for fact in audit.parts[1].facts}
    kept, moved = int(facts["rows"].split(":")[0]), int(facts["compared with the held-out rows"].split()[0])
    assert kept + moved == 10


def test_commands_name_the_right_file_after_a_fraction_was_held_out(tmp_path: Path) -> None:
    one = write(tmp_path / "one.jsonl", questions(10))
    two = write(tmp_path / "two.jsonl", [*questions(30, 10), *questions(30, 10)])
    stage = SftStage(name="sft", train=[one, two], heldout_fraction=0.5)
    audit = audit_recipe(Recipe(name="demo", model=Model(path="x"), stages=[stage]))
    (found,) = [finding for finding in audit.findings if finding.kind == "duplicates"]
    assert [mend.path for mend in found.mends] == [two.path]
    assert all(Path(two.path).name in row_id for row_id in found.ids)


@needs_data
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sft/alpaca_en_demo.json", {"duplicates": 14}),
        ("pref/alpaca_style_preference_1100.json", {"equal-pairs": 6}),
        ("pref/hh_rlhf_harmless_test.jsonl.gz", {"early-divergence": 5}),
        ("pref/dpo_en_demo.json", {"duplicates": 5}),
        ("sft/identity.json", {"placeholders": 85}),
        ("sft/v1_sft_demo.jsonl", {"placeholders": 54}),
    ],
)
def test_the_known_dirt_of_real_files(name: str, expected: dict[str, int]) -> None:
    found = counts(audit_source(Source(path=str(SHARED / name))))
    assert expected.items() <= found.items()
