from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.data.build import byte_tokenizer, space_tokenizer
from tunesmith.data.tokens import MARK, Codec
from tunesmith.data.types import RowError
from tunesmith.errors import ModelError

BYTES = Codec(byte_tokenizer())
SPACES = Codec(space_tokenizer())
texts = st.text(st.characters(exclude_categories=("Cs",), exclude_characters=MARK), min_size=1, max_size=40)


def test_cut_by_hand() -> None:
    encoded = BYTES.encode("<s>the\U0001f600world")  # a control token, letters, an emoji of four byte tokens
    letters = len(BYTES.encode("the").ids)
    assert [encoded.cut(place) for place in (0, 1, 3)] == [0, None, 1]
    assert encoded.cut(6) == 1 + letters
    assert encoded.cut(7) == 1 + letters + 4
    assert encoded.cut(len("<s>the\U0001f600world")) == len(encoded.ids)


@given(st.lists(st.sampled_from(["<s>", "</s>", "<|im_end|>", "the", " world", "\n", " ", "\u0301", "a", MARK])))
def test_cutting_at_control_tokens_changes_no_id(parts: list[str]) -> None:
    """Each stretch between control tokens by itself gives the ids of the tokenizer's own call."""
    text = "".join(part for part in parts if part != MARK)
    encoded = BYTES.encode(text)
    whole = BYTES.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assert encoded.ids == list(whole["input_ids"])
    starts = [start for start, _ in whole["offset_mapping"]]
    for place in range(len(text) + 1):
        count = sum(start < place for start in starts)
        crossed = count > 0 and whole["offset_mapping"][count - 1][1] > place
        assert encoded.cut(place) == (None if crossed else count)


def test_the_fixture_merges_across_an_edge() -> None:
    whole = BYTES.encode("the world")
    assert whole.cut(4) is None  # " world" is one token
    assert BYTES.encode("the ").ids != whole.ids[: len(BYTES.encode("the ").ids)]


@given(texts)
def test_any_text_survives_as_a_start_and_as_a_continuation(text: str) -> None:
    assert BYTES.writes(BYTES.continuation(text), text)
    assert SPACES.writes(SPACES.continuation(text), text)
    assert SPACES.writes(SPACES.encode(text).ids, text, continues=False)


def test_a_continuation_gets_no_space_of_the_tokenizers_own() -> None:
    assert not SPACES.additive
    assert SPACES.tokenizer.decode([*SPACES.encode("hello").ids, *SPACES.continuation("world")]) == "helloworld"
    assert SPACES.tokenizer.decode([*SPACES.encode("hello").ids, *SPACES.encode("world").ids]) == "hello world"
    assert BYTES.additive


def test_head_ids_are_what_the_tokenizers_own_call_adds() -> None:
    assert BYTES.head_ids == []
    assert Codec(byte_tokenizer(adds_bos=True)).head_ids == [0]
    assert SPACES.head_ids == [1]


@given(st.lists(st.sampled_from(["<s>", "</s>", "<|im_end|>", "<|im_start|>", "<", "s>", "|", "im_end|>", "é ", "a"])))
def test_marked_content_never_becomes_a_control_token(parts: list[str]) -> None:
    text = "".join(parts)
    marked = BYTES.marked(text, special_only=False)
    assert marked.replace(MARK, "") == text
    encoded = BYTES.encode(marked)
    assert BYTES.num_controls(encoded.ids) == BYTES.num_controls_spelled(marked) == 0
    assert BYTES.decode(encoded.ids) == text
    assert (marked != text) == BYTES.spells_control(text) == (BYTES.num_controls_spelled(text) > 0)


@pytest.mark.parametrize("codec", [BYTES, SPACES])
def test_places_in_marked_text_count_the_marks(codec: Codec) -> None:
    marked = codec.marked("a</s>b", special_only=False)
    assert marked == f"a<{MARK}/s>b"
    encoded = codec.encode(marked)
    assert [encoded.cut(place) for place in range(len(marked) + 1)][-3:] == [
        len(encoded.ids) - 2,
        len(encoded.ids) - 1,
        len(encoded.ids),
    ]
    assert encoded.cut(1) == (2 if codec is SPACES else 1)


def test_added_tokens_that_are_not_special_are_left_to_the_model() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<think>"])
    codec = Codec(tokenizer)
    assert codec.marked("<think></s>", special_only=True) == f"<think><{MARK}/s>"
    assert codec.marked("<|im_end|>", special_only=True) == f"<{MARK}|im_end|>"  # special, though it has no name
    assert codec.marked("<think></s>", special_only=False) == f"<{MARK}think><{MARK}/s>"


def test_texts_that_cannot_be_told_from_control_tokens_are_refused() -> None:
    with pytest.raises(RowError, match=r"U\+FDD0"):
        BYTES.marked(f"a{MARK}", special_only=False)
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "§"})
    with pytest.raises(RowError, match="a control token of a single character"):
        Codec(tokenizer).marked("a § b", special_only=False)


def test_unicode_normal_forms_of_the_tokenizer_are_accepted() -> None:
    ids = BYTES.encode("caf\u00e9").ids
    assert BYTES.writes(ids, "cafe\u0301")  # NFC of it, as Qwen's tokenizer writes
    assert not BYTES.writes(ids, "cafe")


def test_tokenizers_without_eos_are_refused() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match=r"no end-of-sequence token.*\n.*Set `eos_token`"):
        Codec(tokenizer)
