"""Scored rows by hand: what is written, what is kept, which pairs are made."""

from __future__ import annotations

import pytest

from tunesmith.data.types import Example, Message
from tunesmith.errors import DataError
from tunesmith.pipeline.scored import Scored, kept, make_pairs, refuse_taken, with_scores


def _example(name: str, prompt: str, *answers: str, role: str = "assistant") -> Example:
    return Example(name, "", (Message("user", prompt),), tuple((Message(role, answer),) for answer in answers))


def _row(name: str, *scores: float, prompt: str = "p") -> Scored:
    answers = tuple(f"{name}{number}" for number in range(len(scores)))
    return Scored(name, {"a": 1}, _example(name, prompt, *answers), scores)


def test_a_row_keeps_its_fields_and_gets_its_scores() -> None:
    assert with_scores(_row("x", 2.0), "score") == {"a": 1, "score": 2.0}
    assert with_scores(_row("x", 2.0, 0.5), "r") == {"a": 1, "r": 1.5, "chosen_r": 2.0, "rejected_r": 0.5}
    assert with_scores(_row("x", 2.0, 0.5, 3.0), "score") == {"a": 1, "score": [2.0, 0.5, 3.0]}
    assert with_scores(Scored("x", {"a": 1}, reason="empty answer"), "score") == {"a": 1, "score": None}


def test_nothing_of_the_files_is_overwritten() -> None:
    with pytest.raises(DataError, match="chosen_score"):
        refuse_taken([Scored("x", {"chosen_score": 1})], "score")
    refuse_taken([Scored("x", {"chosen_score": 1})], "other")


def test_filters_go_by_the_answer_the_lead_or_the_best_in_the_files_order() -> None:
    rows = [_row("a", 1.0), _row("b", 5.0, 1.0), _row("c", 0.0, 3.0, 2.0), Scored("d", {}), _row("e", 1.0)]
    assert [row.id for row in kept(rows, above=None, top=None)] == ["a", "b", "c", "d", "e"]
    assert [row.id for row in kept(rows, above=1.0, top=None)] == ["b", "c"]  # 4 and 3; 1 is not above 1
    assert [row.id for row in kept(rows, above=None, top=0.75)] == ["a", "b", "c"]  # of equal ones the earlier
    assert [row.id for row in kept(rows, above=3.5, top=0.5)] == ["b"]
    assert [row.id for row in kept(rows[:1], above=None, top=0.01)] == ["a"]


def test_of_each_prompt_the_best_and_the_worst_make_a_pair() -> None:
    rows = [_row("a", 1.0), _row("b", 2.0, prompt="q"), _row("c", 3.0), _row("d", 2.0), _row("e", 2.0, prompt="q")]
    (pair,) = make_pairs(rows, "score")  # the answers to q tie
    assert with_scores(pair, "score") == {
        "prompt": [{"role": "user", "content": "p"}],
        "chosen": [{"role": "assistant", "content": "c0"}],
        "rejected": [{"role": "assistant", "content": "a0"}],
        "rows": ["c", "a"],
        "score": 2.0,
        "chosen_score": 3.0,
        "rejected_score": 1.0,
    }


def test_a_ranking_makes_a_pair_and_a_wrong_pair_is_turned_round() -> None:
    (pair,) = make_pairs([_row("a", 1.0, 4.0, 2.0)], "score")
    assert pair.scores == (4.0, 1.0)
    assert pair.fields["rows"] == ["a"]
    (turned,) = make_pairs([_row("b", 1.0, 2.0)], "score")
    assert turned.fields["chosen"] == [{"role": "assistant", "content": "b1"}]


def test_raw_text_stays_text_and_tools_are_refused() -> None:
    raw = Scored("r", {}, Example("r", "", "Once", (" upon", " more")), (1.0, 2.0))
    assert make_pairs([raw], "score")[0].fields == {
        "prompt": "Once",
        "chosen": " more",
        "rejected": " upon",
        "rows": ["r"],
    }
    with pytest.raises(DataError, match="tools"):
        make_pairs([Scored("t", {}, _example("t", "p", "x", "y", role="tool"), (1.0, 2.0))], "score")
