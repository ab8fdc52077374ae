from __future__ import annotations

from tests.unit.data.audit.rows import PROSE, clean, only, sft, subject
from tunesmith.data.audit.leakage import leakage, leaks
from tunesmith.data.audit.subject import HELDOUT
from tunesmith.data.types import Example

PASSAGE = " ".join(PROSE.split()[:13])


def held(place: int, prompt: str, answer: str) -> Example:
    example = sft(place, prompt, answer)
    return Example(f"held.jsonl:{place + 1}", example.sha, example.prompt, example.answers)


def test_the_same_prompt_is_a_blocker_with_its_command() -> None:
    train = [*clean(5), sft(5, "Who keeps the light?", "Somebody does.")]
    rows = subject(
        train, heldout=[held(0, "who keeps  the light?", "Nobody."), held(1, "What is for dinner?", "Soup.")]
    )
    found = only(leakage(rows))
    assert (found.ids, found.count, found.total, found.severity) == (("held.jsonl:1",), 1, 2, "blocker")
    assert found.shown[0].note == "same prompt as rows.jsonl:6"
    assert found.fix == "tunesmith data fix rows.jsonl --drop leakage --against held.jsonl -o rows.clean.jsonl"


def test_near_duplicates_across_the_split() -> None:
    rows = subject([sft(0, "Tell a tale.", PROSE)], heldout=[held(0, "Tell us one.", PROSE.replace("herring", "cod"))])
    found = only(leakage(rows))
    assert (found.severity, found.shown[0].note) == ("blocker", "nearly the same as rows.jsonl:1")


def test_thirteen_words_in_a_row_are_a_warning_and_twelve_are_not() -> None:
    train = [
        *clean(3),
        sft(3, "Quote the book.", f"It says: {PASSAGE}, and then much else that is new to everyone here."),
    ]
    other = "Surely a very different continuation follows after this point, about mountains and goats."
    found = only(leakage(subject(train, heldout=[held(0, "Go on from this.", f"{PASSAGE} {other}")])))
    assert (found.severity, found.shown[0].note) == ("warning", "13 words in a row shared with rows.jsonl:4")
    twelve = " ".join(PASSAGE.split()[:12])
    assert leakage(subject(train, heldout=[held(0, "Go on from this.", f"{twelve} {other}")])) == []


def test_boilerplate_of_more_than_ten_rows_is_no_leak() -> None:
    train = [sft(place, f"{PASSAGE} {place}?", f"Answer {place} of {place * 3}.") for place in range(11)]
    assert leakage(subject(train, heldout=[held(0, f"{PASSAGE} unlike any?", "Some quite other answer.")])) == []
    found = leakage(subject(train[:10], heldout=[held(0, f"{PASSAGE} unlike any?", "Some quite other answer.")]))
    assert found[0].severity == "warning"


def test_named_evaluation_sets_each_have_a_finding() -> None:
    train = [sft(0, "Two and two?", "Four."), sft(1, "Three and three?", "Six.")]
    sets = {
        "a.jsonl": [held(0, "Two and two?", "4")],
        "b c.jsonl": [held(1, "Three and three?", "6")],
        "d.jsonl": clean(1),
    }
    found = leakage(subject(train, evaluations=sets))
    assert [finding.title for finding in found] == ["leakage of a.jsonl", "leakage of b c.jsonl"]
    assert "--against 'b c.jsonl'" in found[1].fix


def test_every_training_row_that_leaks_is_known() -> None:
    train = [sft(0, "Why?", "A."), sft(1, "Why?", "B."), sft(2, "Who?", "C.")]
    found = leaks(subject(train, heldout=[held(0, "Why?", "D.")]), HELDOUT)
    assert [leak.train for leak in found] == [0, 1]
    assert leakage(subject(train)) == []
