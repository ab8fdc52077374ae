from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.unit.data.build import CHATML, renderer, write_jsonl
from tunesmith.data.examples import example_of
from tunesmith.data.prepare import Prepared, prepare_stage
from tunesmith.data.shape import balance_notes, best_and_worst
from tunesmith.data.types import Example, Json
from tunesmith.errors import DataError
from tunesmith.recipe.models import Source
from tunesmith.recipe.preferences import (
    BcoUnpairedStage,
    DpoStage,
    HingeStage,
    KtoStage,
    PlackettLuceStage,
    PreferenceStage,
)


def prepare(path: Path, kind: type[PreferenceStage], **knobs: object) -> Prepared:
    values = {"name": "one", "train": [Source(path=str(path))], **knobs}
    return prepare_stage(kind.model_validate(values), renderer(CHATML))


def pair(number: int, **more: Json) -> dict[str, Json]:
    return {"prompt": f"question {number}", "chosen": f"good {number}", "rejected": f"bad answer {number}", **more}


def ranked(number: int, scores: list[Json]) -> dict[str, Json]:
    answers: list[Json] = [f"a{number}", f"bb{number}", f"ccc{number}"]
    return {"prompt": f"question {number}", "responses": answers, "scores": scores}


def judged(number: int, label: bool) -> dict[str, Json]:
    return {"prompt": f"question {number}", "completion": f"answer {number}", "label": label}


def texts(prepared: Prepared) -> list[list[str]]:
    codec = renderer(CHATML).codec
    return [
        [codec.decode(branch.ids.tolist()).split("<|im_end|>")[0] for branch in tree.branches]
        for tree in prepared.train
    ]


def test_the_best_and_the_worst_of_a_ranking_are_a_pair(tmp_path: Path) -> None:
    prepared = prepare(write_jsonl(tmp_path / "r.jsonl", ranked(1, [2, 1, 3]), ranked(2, [5, 5, 0])), DpoStage)
    assert texts(prepared) == [["ccc1", "bb1"], ["a2", "ccc2"]]
    assert any("2 rows: of several ranked answers the best and the worst" in note for note in prepared.notes)
    assert [tree.scores for tree in prepared.train] == [(), ()]  # plain DPO reads none


def test_the_first_best_and_the_last_worst() -> None:
    example = Example("x", "s", "p", ("a", "b", "c", "d"), scores=(1.0, 2.0, 2.0, 1.0))
    found = best_and_worst(example)
    assert (found.answers, found.scores) == (("b", "d"), (2.0, 1.0))


def test_scores_are_read_where_the_stage_reads_them(tmp_path: Path) -> None:
    rows = [pair(1, chosen_score=4, rejected_score=1.5), pair(2, margin=0.5)]
    prepared = prepare(write_jsonl(tmp_path / "p.jsonl", *rows), DpoStage, margin="scores")
    assert [tree.scores for tree in prepared.train] == [(4.0, 1.5), (0.5, 0.0)]
    from_ranks = write_jsonl(tmp_path / "r.jsonl", ranked(1, [2, 1, 3]))
    assert prepare(from_ranks, DpoStage, margin="scores").train[0].scores == (3.0, 1.0)
    with pytest.raises(DataError, match="chosen_score: found no such key; wanted scores of both answers"):
        prepare(write_jsonl(tmp_path / "q.jsonl", *rows, pair(3)), DpoStage, margin="scores")


def test_weights_are_read_where_the_stage_reads_them(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", pair(1, weight=0.5), pair(2, weight="2"))
    assert [tree.weight for tree in prepare(path, HingeStage, pair_weights="rows").train] == [0.5, 2.0]
    plain = prepare(path, HingeStage)
    assert [tree.weight for tree in plain.train] == [1.0, 1.0]
    assert any("2 rows: a `weight` that is not read" in note for note in plain.notes)
    for bad, found in ((0, "0"), (-1, "-1"), ("x", '"x"'), (None, "null")):
        wrong = write_jsonl(tmp_path / "w.jsonl", pair(1, weight=1), pair(2, weight=bad))
        with pytest.raises(DataError, match=f"weight: found {found}; wanted a number"):
            prepare(wrong, HingeStage, pair_weights="rows")


def test_pairs_are_two_labeled_answers(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", pair(1), pair(2))
    prepared = prepare(path, BcoUnpairedStage)
    assert texts(prepared) == [["good 1"], ["bad answer 1"], ["good 2"], ["bad answer 2"]]
    assert [tree.label for tree in prepared.train] == [True, False, True, False]
    assert [tree.id for tree in prepared.train][:2] == [f"{path}:1#chosen", f"{path}:1#rejected"]
    assert sum(count.num_rows for count in prepared.ledger.summary()) == 2  # rows, not trees
    assert any("2 rows: a pair became two labeled answers" in note for note in prepared.notes)


def test_pairs_are_rankings_of_two_whatever_their_scores(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", pair(1, chosen_score=1, rejected_score=9))
    assert prepare(path, PlackettLuceStage).train[0].scores == (1.0, 0.0)


def test_rankings_keep_every_answer_and_score(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "r.jsonl", ranked(1, [2, 1, 3]))
    prepared = prepare(path, PlackettLuceStage)
    assert (texts(prepared), prepared.train[0].scores) == ([["a1", "bb1", "ccc1"]], (2.0, 1.0, 3.0))
    two = {"prompt": "question", "responses": ["a", "b"], "scores": [1, 2]}
    notes = prepare(write_jsonl(tmp_path / "2.jsonl", two), DpoStage).notes
    assert not any("rejected answer" in note for note in notes)


def test_heldout_examples_are_in_the_stages_shape(tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "t.jsonl", ranked(1, [2, 1, 3]))
    held = write_jsonl(tmp_path / "h.jsonl", ranked(2, [2, 1, 3]))
    prepared = prepare(train, DpoStage, heldout=[Source(path=str(held))])
    assert [len(example.answers) for example in prepared.heldout_examples] == [2]


def test_examples_of_earlier_releases_have_no_weight() -> None:
    line = b'{"id":"a","sha":"","prompt":"p","answers":["x"],"value":null,"accepted":[],"tags":{},"tools":"",'
    assert example_of(line + b'"scores":[],"label":null}').weight == 1.0


# --- KTO


def kto(**knobs: object) -> KtoStage:
    return KtoStage.model_validate({"name": "k", "train": [Source(path="x")], **knobs})


def test_balance_is_advised_on_with_the_weight_that_mends_it() -> None:
    label_G = np.array([1.0] * 30 + [0.0] * 60)
    (note,) = balance_notes(kto(), label_G)
    assert "30 desirable and 60 undesirable answers count 0.5 : 1" in note
    assert "`desirable_weight: 2.5`" in note  # 2.5 * 30 / 60 = 1.25, between 1 and 3/2
    assert balance_notes(kto(desirable_weight=2.5), label_G) == []
    (note,) = balance_notes(kto(), 1 - label_G)
    assert "`undesirable_weight: 1.6`" in note  # 60 / (1.6 * 30) = 1.25
    assert balance_notes(kto(undesirable_weight=1.6), 1 - label_G) == []
    assert balance_notes(kto(), np.array([1.0] * 3 + [0.0] * 2)) == []  # 3/2 is still inside
    assert balance_notes(kto(), np.ones(5)) == []  # said elsewhere


def test_advice_follows_the_weights_and_not_the_cache(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "k.jsonl", *(judged(number, number == 1) for number in range(1, 5)))
    assert any("answers count 0.333 : 1" in note for note in prepare(path, KtoStage).notes)
    assert not any("answers count" in note for note in prepare(path, KtoStage, desirable_weight=3.5).notes)
