from __future__ import annotations

from tests.unit.data.audit.rows import clean, labeled, lines, only, pair, sft, subject
from tunesmith.data.audit.pairs import (
    components,
    contradictions,
    early_divergence,
    equal_pairs,
    labels_and_ties,
    length_bias,
    wilson,
)
from tunesmith.data.audit.subject import Lost, Subject
from tunesmith.data.types import Example, Message


def test_a_over_b_and_b_over_a() -> None:
    rows = [pair(0, "Why?", "A", "B"), pair(1, "Why?", "B", "A"), pair(2, "Why?", "A", "C"), pair(3, "Who?", "B", "A")]
    found = only(contradictions(subject(rows)))
    assert (lines(found), found.severity) == ([1, 2], "blocker")


def test_cycles_of_any_length() -> None:
    names = "ABCDEFG"
    ring = [pair(place, "Why?", names[place], names[(place + 1) % 7]) for place in range(7)]
    found = only(contradictions(subject([*ring, pair(7, "Why?", "A", "Z")])))
    assert lines(found) == [1, 2, 3, 4, 5, 6, 7]
    assert "cycles of up to 7 answers" in found.text
    assert contradictions(subject(ring[:-1])) == []  # an order has no cycle


def test_contradictory_labels_and_scores() -> None:
    rows = [labeled(0, "Why?", "So.", True), labeled(1, "Why?", "So.", False), labeled(2, "Why?", "No.", False)]
    assert lines(only(contradictions(subject(rows)))) == [1, 2]
    scored = [pair(0, "Why?", "A", "B", "C", scores=(1, 2, 3)), pair(1, "Why?", "A", "C", scores=(2, 1))]
    assert lines(only(contradictions(subject(scored)))) == [1, 2]  # C > B > A, and A > C


def test_components_by_hand() -> None:
    found = components([("a", "b"), ("b", "a"), ("b", "c"), ("c", "d"), ("d", "c"), ("e", "a")])
    assert found["a"] == found["b"] and found["c"] == found["d"]
    assert len({found["a"], found["c"], found["e"]}) == 3


def test_a_long_chain_needs_no_recursion() -> None:
    edges = [(str(place), str(place + 1)) for place in range(5000)]
    assert len(set(components(edges).values())) == 5001


def test_equal_pairs_also_among_dropped_rows() -> None:
    rows = [pair(0, "Why?", "So it is.", "So it is. "), pair(1, "Why?", "So.", "No.")]
    lost = [Lost("rows.jsonl:9", "chosen equals rejected", "rows.jsonl"), Lost("rows.jsonl:10", "empty answer", "")]
    found = only(equal_pairs(Subject(rows, lost=lost)))
    assert (found.ids, found.count, found.total) == (("rows.jsonl:9", "rows.jsonl:1"), 2, 4)
    assert found.fix == "tunesmith data fix rows.jsonl --drop equal-pairs -o rows.clean.jsonl"
    assert equal_pairs(subject(rows[1:])) == []


def test_pairs_that_part_before_the_last_turn() -> None:
    long = (Message("assistant", "Hm."), Message("user", "And?"), Message("assistant", "Yes."))
    early = Example("rows.jsonl:1", "s", (Message("user", "Why?"),), (long, (Message("assistant", "No."),)))
    found = only(early_divergence(subject([early, pair(1, "Who?", "I.", "You.")])))
    assert (lines(found), found.severity, found.fix) == ([1], "note", "")
    assert early_divergence(subject([pair(1, "Who?", "I.", "You.")])) == []


def test_length_bias_with_its_interval() -> None:
    rows = [pair(place, f"Number {place}?", "long answer" if place < 32 else "no", "short") for place in range(40)]
    found = only(length_bias(subject(rows)))
    # Wilson for 32 of 40: centre (0.8 + 3.8415 / 80) / (1 + 3.8415 / 40) = 0.7737, half width 0.1215
    assert "80% of 40 pairs (95 % interval 65% to 90%)" in found.text
    assert (found.severity, found.count, found.total) == ("warning", 32, 40)
    assert "correlate" not in found.text


def test_length_bias_correlates_with_scores() -> None:
    rows = [pair(place, "?", "x" * (place + 2), "x", scores=(place + 2.0, 1.0)) for place in range(30)]
    assert "length and score correlate at 1.00" in only(length_bias(subject(rows))).text


def test_no_length_bias_where_the_interval_holds_a_half() -> None:
    rows = [pair(place, f"Number {place}?", "long answer" if place % 2 else "no", "short") for place in range(40)]
    assert length_bias(subject(rows)) == []
    assert length_bias(subject([pair(0, "?", "long answer", "no")])) == []  # one pair says nothing


def test_wilson_has_a_width_at_the_ends() -> None:
    low, high = wilson(0, 10)
    assert (low, round(high, 4)) == (0.0, 0.2775)  # z^2 / (n + z^2) = 3.8415 / 13.8415


def test_one_sided_labels_and_ties() -> None:
    rows = [labeled(place, f"Number {place}?", "So.", True) for place in range(40)]
    found = only(labels_and_ties(subject(rows)))
    assert (found.kind, found.severity, found.count) == ("labels", "blocker", 40)
    found = only(labels_and_ties(subject([*rows, labeled(40, "?", "So.", False)])))
    assert (found.severity, found.count, found.total) == ("warning", 40, 41)
    tied = [pair(0, "?", "A", "B", scores=(1, 1)), pair(1, "?", "A", "B", scores=(2, 1))]
    found = only(labels_and_ties(subject(tied)))
    assert (found.kind, lines(found), found.severity) == ("ties", [1], "warning")
    assert labels_and_ties(subject([labeled(0, "?", "A", True), labeled(1, "?", "B", False)])) == []
    assert labels_and_ties(subject([*clean(2), sft(3, "?", "A")])) == []
