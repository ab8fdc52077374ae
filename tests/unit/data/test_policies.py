"""What a stage's policies do to rows: bad ones, repeated ones, over-long ones, mixed files, several sources."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.data.build import CHATML, GEMMA, renderer, write_jsonl
from tests.unit.data.test_prepare import prepare, qa, refusal
from tunesmith.data.types import Json


def fates(path: Path, **knobs: object) -> Counter[tuple[str, str]]:
    """Fate and kind of reason of every row."""
    return Counter((each.outcome, each.reason.partition(":")[0]) for each in prepare(path, **knobs).ledger)  # type: ignore[arg-type]


def test_a_cut_off_last_line_stops_with_its_line_or_is_dropped(tmp_path: Path) -> None:
    """F25."""
    path = write_jsonl(tmp_path / "a.jsonl", *(qa(number) for number in range(200)))
    path.write_bytes(path.read_bytes()[:-9])
    assert f"{path}:200: line: found" in refusal(path)
    assert fates(path, on_bad_row="drop") == {("kept", ""): 199, ("dropped", "malformed"): 1}
    assert "more than `max_bad_rows: 0.001` allows" in refusal(path, on_bad_row="drop", max_bad_rows=0.001)


def test_unreadable_and_malformed_rows_are_shown_together(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", qa(1), {"question": 3, "answer": "a"}, qa(2))
    path.write_bytes(path.read_bytes() + b'{"question": "\xff"}\n')
    text = refusal(path)
    assert text.startswith(f"{path}: 2 of 4 rows do not fit")
    assert f"{path}:2: question: found 3; wanted a string" in text
    assert f"{path}:4: line: found" in text


def test_twenty_bad_rows_are_enough_to_stop(tmp_path: Path) -> None:
    rows: list[Json] = [{"question": number, "answer": "a"} for number in range(3000)]
    path = write_jsonl(tmp_path / "a.jsonl", qa(1), *rows)
    text = refusal(path)
    assert text.count("wanted a string") == 20  # each found another number, so each has its line
    assert "1023 of 1024 rows do not fit" in text  # the first chunk: the rest is not read


def test_rows_with_the_same_trouble_share_a_line(tmp_path: Path) -> None:
    rows: list[Json] = [{"question": "q"}] * 4
    path = write_jsonl(tmp_path / "a.jsonl", qa(1), *rows, {"question": 3, "answer": "a"})
    assert refusal(path).splitlines()[1:4] == [
        f"  {path}:2: answer: found no such key; wanted a string",
        "    the same in :3, :4, :5",
        f"  {path}:6: question: found 3; wanted a string",
    ]


def test_a_mixed_file_is_refused_with_the_counts_of_the_whole_file(tmp_path: Path) -> None:
    rows: list[Json] = [qa(number) for number in range(1100)]
    others: list[Json] = [{"instruction": "i", "output": str(number)} for number in range(37)]
    text = refusal(write_jsonl(tmp_path / "a.jsonl", *rows, *others, *rows))
    assert "2200 question_answer" in text
    assert "37 alpaca" in text


def test_repetitions_are_kept_or_merged(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", qa(1), qa(2), qa(1), qa(1, "another"), qa(1))
    assert fates(path) == {("kept", ""): 5}
    prepared = prepare(path, duplicates="merge")
    assert [tree.id for tree in prepared.train] == [f"{path}:{line}" for line in (1, 2, 4)]
    assert [each.id for each in prepared.ledger if each.outcome == "merged"] == [f"{path}:3", f"{path}:5"]
    assert "2 training rows repeat an earlier one and were merged into it." in prepared.notes


def test_a_row_that_is_held_out_is_not_trained(tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "a.jsonl", qa(1), qa(2), qa(3))
    heldout = write_jsonl(tmp_path / "b.jsonl", qa(2), qa(4))
    prepared = prepare(train, heldout=[{"path": str(heldout)}])
    assert [tree.id for tree in prepared.train] == [f"{train}:1", f"{train}:3"]
    (leaked,) = (each for each in prepared.ledger if each.outcome == "dropped")
    assert (leaked.id, leaked.split) == (f"{train}:2", "train")
    assert leaked.reason.startswith("held out as well")
    assert any("1 training rows are held out as well" in note for note in prepared.notes)


def test_sources_are_drawn_by_weight(tmp_path: Path) -> None:
    one = write_jsonl(tmp_path / "a.jsonl", *(qa(number) for number in range(40)))
    other = write_jsonl(tmp_path / "b.jsonl", *(qa(number, "other") for number in range(100, 130)))
    sources = [{"path": str(one), "weight": 1}, {"path": str(other), "weight": 3}]
    prepared = prepare(one, train=sources)
    counts = Counter(Path(tree.id.rpartition(":")[0]).name for tree in prepared.train)
    assert counts == {"a.jsonl": 10, "b.jsonl": 30}
    window = Counter(Path(tree.id.rpartition(":")[0]).name for tree in prepared.train[:8])
    assert window == {"a.jsonl": 2, "b.jsonl": 6}
    dropped = [each for each in prepared.ledger if each.outcome == "dropped"]
    assert len(dropped) == 30
    assert {each.reason for each in dropped} == {"not drawn: beyond its source's weight"}
    assert len(prepared.ledger) == 70
    assert prepare(one, train=sources).train[3].sha() == prepared.train[3].sha()


def test_scores_that_contradict_the_choice_are_said(tmp_path: Path) -> None:
    """F32."""
    pair: dict[str, Json] = {"prompt": "q", "chosen": "a", "rejected": "b", "score_rejected": 2}
    rows: list[Json] = [pair | {"score_chosen": score, "chosen": f"a{score}"} for score in (1, 2, 3)]
    path = write_jsonl(tmp_path / "a.jsonl", *rows)
    notes = prepare(path, "dpo").notes
    assert f"WARNING: {path}: 1 of 3 pairs have equal scores." in notes
    assert f"WARNING: {path}: 1 of 3 pairs give the rejected answer the higher score." in notes


def test_lengths_and_a_good_max_length_are_said(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", *(qa(number, "word " * 20) for number in range(300)), qa(300, "w " * 600))
    (note,) = (note for note in prepare(path, r=renderer(CHATML, max_length=200)).notes if note.startswith("lengths"))
    assert "`max_length: 128` would keep 99 % of them (it is 200)." in note


def test_several_processes_give_the_same_trees_in_the_same_order(tmp_path: Path) -> None:
    from tunesmith.data.prepare import prepare_stage
    from tunesmith.data.store import digest_of
    from tunesmith.recipe.models import SftStage

    rows: list[Json] = [qa(number, "a " * (number % 7)) for number in range(2500)]
    path = write_jsonl(tmp_path / "a.jsonl", *rows)
    values = {"name": "one", "method": "sft", "train": [{"path": str(path)}], "heldout_fraction": 0.1}
    stage = SftStage.model_validate(values)
    alone = prepare_stage(stage, renderer(CHATML), workers=1, cache_folder=tmp_path / "one")
    many = prepare_stage(stage, renderer(CHATML), workers=2, cache_folder=tmp_path / "two")
    assert alone.key == many.key
    assert digest_of(alone.train) == digest_of(many.train)
    assert digest_of(alone.heldout) == digest_of(many.heldout)
    assert [tree.id for tree in alone.train] == [tree.id for tree in many.train]
    assert list(alone.ledger) == list(many.ledger)
    assert alone.notes == many.notes
    assert list(alone.heldout_examples) == list(many.heldout_examples)


KINDS: dict[str, Json] = {
    "good": {"question": "q", "answer": "a"},
    "repeated": {"question": "same", "answer": "same"},
    "empty": {"question": "q", "answer": " "},
    "malformed": {"question": 1, "answer": "a"},
    "long": {"question": "q", "answer": "word " * 100},
}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kinds=st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=30),
    fraction=st.sampled_from([0.0, 0.3]),
    duplicates=st.sampled_from(["keep", "merge"]),
)
def test_the_counts_always_add_up(tmp_path: Path, kinds: list[str], fraction: float, duplicates: str) -> None:
    rows = [dict(KINDS[kind]) for kind in kinds]  # type: ignore[arg-type, call-overload]
    for number, (kind, row) in enumerate(zip(kinds, rows, strict=True)):
        row |= {"question": f"q{number}"} if kind in ("good", "empty", "long") else {}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [KINDS["good"], *rows]))
    values = {"heldout_fraction": fraction, "duplicates": duplicates, "on_bad_row": "drop", "max_bad_rows": 1.0}
    prepared = prepare(path, r=renderer(CHATML, max_length=60), **values)
    ledger = list(prepared.ledger)
    assert len(ledger) == len(rows) + 1 == sum(count.num_rows for count in prepared.ledger.summary())
    assert [each.id for each in ledger] == [f"{path}:{line}" for line in range(1, len(rows) + 2)]
    kept = [each for each in ledger if each.outcome in ("kept", "trimmed")]
    assert sum(each.split == "train" for each in kept) == len(prepared.train)
    assert sum(each.split == "heldout" for each in kept) == len(prepared.heldout)
    assert sum(each.trained_tokens for each in ledger) == sum(
        tree.num_trained for tree in (*prepared.train, *prepared.heldout)
    )
    for kind, each in zip(kinds, ledger[1:], strict=True):
        wanted = {"good": "kept", "empty": "dropped", "malformed": "dropped", "long": "dropped"}.get(kind)
        assert wanted is None or each.outcome == wanted


def test_a_row_that_fails_is_replaced_by_no_other(tmp_path: Path) -> None:
    """PEERS 8: under `drop` it is gone, counted, and every other row is there once."""
    rows: list[Json] = [qa(number) for number in range(10)]
    rows[4] = {**qa(4), "system": "s"}
    path = write_jsonl(tmp_path / "a.jsonl", *rows)
    prepared = prepare(path, r=renderer(GEMMA), on_bad_row="drop", max_bad_rows=0.2)
    assert [tree.id for tree in prepared.train] == [f"{path}:{line}" for line in range(1, 11) if line != 5]
    (lost,) = (each for each in prepared.ledger if each.outcome == "dropped")
    assert lost.id == f"{path}:5"
    assert "System role not supported" in lost.reason


def test_a_row_of_ten_megabytes_is_dropped_in_no_time(tmp_path: Path) -> None:
    """F30."""
    path = write_jsonl(tmp_path / "a.jsonl", qa(1), qa(2, "word " * 2_000_000))
    start = time.process_time()
    assert fates(path) == {("kept", ""): 1, ("dropped", "longer than max_length"): 1}
    assert time.process_time() - start < 5


@pytest.mark.parametrize("rows", [[], [b"\n", b"  \n"]])
def test_a_file_without_rows_is_refused(tmp_path: Path, rows: list[bytes]) -> None:
    """F29."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(rows))
    assert "the file holds no rows" in refusal(path)
