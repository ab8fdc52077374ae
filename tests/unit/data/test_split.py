from __future__ import annotations

from dataclasses import replace

from tests.unit.data.build import example, replies, turns
from tunesmith.data.sources import content_sha
from tunesmith.data.split import is_heldout, prompt_sha, split_examples


def test_a_row_never_changes_side_when_the_data_grows() -> None:
    examples = [example(turns(f"question {number}"), replies("a")) for number in range(300)]
    _, few = split_examples(examples[:100], 0.2)
    train, many = split_examples(examples[::-1], 0.2)
    assert {prompt_sha(e) for e in few} <= {prompt_sha(e) for e in many}
    assert len(train) + len(many) == 300
    assert 30 <= len(many) <= 90  # 60 expected, standard deviation 7


def test_rows_with_one_prompt_stand_on_one_side() -> None:
    pairs = [(turns(f"q{number}"), replies(answer)) for number in range(50) for answer in ("a", "b")]
    examples = [replace(example(*pair), sha=content_sha(index)) for index, pair in enumerate(pairs)]
    train, heldout = split_examples(examples, 0.5)
    assert not {prompt_sha(e) for e in train} & {prompt_sha(e) for e in heldout}
    assert heldout


def test_texts_are_told_apart_by_the_text() -> None:
    assert prompt_sha(example("", "one")) != prompt_sha(example("", "two"))
    assert prompt_sha(example("p", "one")) == prompt_sha(example("p", "two"))


def test_edges() -> None:
    examples = [example("p", "a")]
    assert split_examples(examples, 0.0) == (examples, [])
    assert is_heldout("0" * 64, 1e-9)
    assert not is_heldout("f" * 64, 0.9999)
