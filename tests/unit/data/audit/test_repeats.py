from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.data.audit.rows import PROSE, clean, lines, only, pair, sft, subject
from tunesmith.data.audit.near import THRESHOLD, NearPair, Words, clusters, jaccard, near_pairs
from tunesmith.data.audit.repeats import duplicates, near_duplicates, repeated_prompts


def test_exact_duplicates_name_the_later_rows() -> None:
    rows = [*clean(4), sft(4, "Why?", "Because."), sft(5, "Why?", "Because."), sft(6, "Why?", "Because.")]
    found = only(duplicates(subject(rows)))
    assert (lines(found), found.count, found.total, found.severity) == ([6, 7], 2, 7, "blocker")  # 2 of 7 > a fifth
    assert found.shown[0].note == "= rows.jsonl:5"
    assert found.fix == "tunesmith data fix rows.jsonl --drop duplicates -o rows.clean.jsonl"


def test_rows_that_differ_in_the_answer_are_no_duplicates() -> None:
    assert duplicates(subject([sft(0, "Why?", "Because."), sft(1, "Why?", "Because!")])) == []


def test_near_duplicates_are_grouped_and_the_first_is_kept() -> None:
    edited = PROSE.replace("herring", "cod")  # one of 51 words: 3 of 49 shingles go, 3 come: 46 / 52 = 0.88
    rows = [*clean(3), sft(3, "Tell me.", PROSE), sft(4, "Tell me.", edited), sft(5, "Tell me.", PROSE + " Truly.")]
    found = only(near_duplicates(subject(rows)))
    assert lines(found) == [5, 6]
    assert "1 group, the largest of 3 rows" in found.text
    assert f">= {THRESHOLD}" in found.text


def test_near_duplicates_leave_out_exact_ones_and_those_with_other_answers() -> None:
    assert near_duplicates(subject([sft(0, "Tell me.", PROSE), sft(1, "Tell me.", PROSE)])) == []
    # A long shared prompt makes the rows alike, their answers do not.
    assert (
        near_duplicates(subject([sft(0, PROSE, "It is morning there."), sft(1, PROSE, "Herring, I think so.")])) == []
    )


def test_a_shared_system_message_makes_nothing_alike() -> None:
    rows = [sft(place, f"Number {place}?", f"{place} it is.", system=PROSE) for place in range(20)]
    assert near_duplicates(subject(rows)) == []


def test_jaccard_by_hand() -> None:
    words = Words()
    one, two = words.shingles("a b c d"), words.shingles("a b c e")  # abc bcd against abc bce: 1 of 3
    assert jaccard(one, two) == 1 / 3
    assert len(words.shingles("a b")) == 1  # shorter than a shingle: the whole text is one


def test_a_pair_just_below_the_threshold_is_none() -> None:
    # Three of 51 words, far from each other: 9 of 49 shingles go and 9 come, 40 / 58 = 0.69.
    edited = PROSE.replace("lighthouse", "mill").replace("boats", "carts").replace("price", "cost")
    words = Words()
    assert jaccard(words.shingles(PROSE), words.shingles(edited)) == 40 / 58
    assert near_pairs([PROSE, edited], words) == []
    assert len(near_pairs([PROSE, edited], words, threshold=0.65)) == 1


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.sampled_from("red green blue one two".split()), max_size=8), max_size=12))
def test_near_pairs_are_never_false_and_equal_texts_always_meet(texts: list[list[str]]) -> None:
    joined = [" ".join(words) for words in texts]
    words = Words()
    found = near_pairs(joined, words)
    for near in found:
        similarity = jaccard(words.shingles(joined[near.first]), words.shingles(joined[near.second]))
        assert near.first < near.second and near.similarity == similarity >= THRESHOLD
    groups = {place: number for number, group in enumerate(clusters(found)) for place in group}
    for first, text in enumerate(joined):
        for second in range(first + 1, len(joined)):
            if text and text == joined[second]:
                assert groups[first] == groups[second]


def test_large_groups_of_alike_texts_stay_one_group() -> None:
    texts = [f"{PROSE} Number {place}." for place in range(300)]
    assert clusters(near_pairs(texts, Words())) == [list(range(300))]


def test_clusters_join_pairs_that_share_a_member() -> None:
    assert clusters([NearPair(0, 5, 1), NearPair(2, 3, 1), NearPair(3, 5, 1), NearPair(7, 8, 1)]) == [
        [0, 2, 3, 5],
        [7, 8],
    ]


def test_repeated_prompts_with_another_answer() -> None:
    rows = [sft(0, "Why?", "Because."), sft(1, "why? ", "Who knows."), sft(2, "Why?", "Because.")]
    found = only(repeated_prompts(subject(rows)))
    assert (lines(found), found.severity) == ([2], "warning")  # the third is an exact duplicate, another finding
    pairs = [pair(0, "Why?", "Good.", "Bad."), pair(1, "Why?", "Fine.", "Bad.")]
    found = only(repeated_prompts(subject(pairs)))
    assert (found.severity, found.fix) == ("note", "")
    assert repeated_prompts(subject(clean(5))) == []
