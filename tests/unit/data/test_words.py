"""Remembered words give the ids that the tokenizer gives, or are not used."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from tests.unit.data.build import byte_tokenizer, space_tokenizer
from tunesmith.data.words import Whole, WordMemo, encode_batch, word_pattern

QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PIECES = ["a", "word", "I'm", "we'LL", " ", "  ", "\n", "\t", "\r\n", "12", "3.5", "--", "''"]
PIECES += ["é", "“q”", "日本", "🙂", "e\u0301", "ſ", "'ſ"]
TEXTS = st.one_of(st.text(max_size=60), st.lists(st.sampled_from(PIECES), max_size=30).map("".join))
REAL = ("qwen2_hf", "gpt2_hf", "llama3_hf")


def qwen_like() -> Tokenizer:
    """The byte-level tokenizer of the tests, cut by Qwen's expression and normalized to NFC."""
    inner = Tokenizer.from_str(byte_tokenizer().backend_tokenizer.to_str())
    split = pre_tokenizers.Split(Regex(QWEN_WORDS), "isolated")
    inner.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    inner.normalizer = normalizers.NFC()
    return inner


def check(backend: Tokenizer, memo: WordMemo, text: str) -> None:
    (whole,) = encode_batch(backend, [text])
    (stretch,) = memo.stretches([text])
    assert stretch.ids == whole.ids
    for place in range(len(text) + 1):
        assert stretch.cut(place) == Whole(whole, whole.ids).cut(place)


GPT2, QWEN = Tokenizer.from_str(byte_tokenizer().backend_tokenizer.to_str()), qwen_like()
MEMOS = {"gpt2": (GPT2, WordMemo(GPT2)), "qwen": (QWEN, WordMemo(QWEN))}


@pytest.mark.parametrize("kind", list(MEMOS))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXTS)
def test_every_text_has_the_tokenizers_own_ids(kind: str, text: str) -> None:
    backend, memo = MEMOS[kind]
    if any(token in text for token in backend.get_vocab() if token.startswith("<")):
        return  # control tokens are cut out before
    check(backend, memo, text)


def test_the_memo_is_used_here() -> None:
    """Else the test above would prove nothing."""
    assert all(memo._words is not None for _, memo in MEMOS.values())


@pytest.mark.parametrize("name", REAL)
def test_real_tokenizers_and_real_texts(name: str, shared_data: Path) -> None:
    from transformers import AutoTokenizer

    backend = AutoTokenizer.from_pretrained(str(shared_data / "tokenizers" / name)).backend_tokenizer
    memo = WordMemo(backend)
    texts = (shared_data / "sft" / "v1_sft_demo.jsonl").read_text().splitlines()[:200]
    texts += (shared_data / "sft" / "c4_demo.jsonl").read_text().splitlines()[:60]
    texts += [text.encode().decode("unicode_escape", "ignore").replace("\x00", "") for text in texts[:40]]
    found = memo.stretches(texts)
    assert [each.ids for each in found] == [whole.ids for whole in encode_batch(backend, texts)]
    # GPT-2's end-of-text token is marked as normalized, and may stand inside a stretch: its texts go through whole.
    assert (memo._words is None) == (name == "gpt2_hf")


def test_other_pipelines_go_through_whole() -> None:
    spaces = space_tokenizer().backend_tokenizer
    assert word_pattern(spaces) is None
    changed = qwen_like()
    changed.normalizer = normalizers.Lowercase()
    assert word_pattern(changed) is None
    changed = qwen_like()
    changed.add_tokens([AddedToken("two words", normalized=True)])
    assert word_pattern(changed) is None
    changed = qwen_like()
    changed.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert word_pattern(changed) is None
    changed = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    changed.decoder = decoders.Fuse()
    assert word_pattern(changed) is None
    memo = WordMemo(spaces)
    (stretch,) = memo.stretches(["hello world"])
    assert stretch.ids == encode_batch(spaces, ["hello world"])[0].ids


def test_an_expression_that_the_trial_disproves_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunesmith.data.words.word_pattern", lambda backend: r"\S+|\s+")
    assert WordMemo(QWEN)._words is None
    monkeypatch.setattr("tunesmith.data.words.word_pattern", lambda backend: r"\p{Lu}+|.")
    assert WordMemo(QWEN)._words is None
    monkeypatch.setattr("tunesmith.data.words.word_pattern", lambda backend: QWEN_WORDS + r"|(?<=a)b")
    assert WordMemo(QWEN)._words is None


def test_long_words_are_not_kept() -> None:
    memo = WordMemo(QWEN)
    check(QWEN, memo, "x" * 500 + " short")
    assert "x" * 500 not in memo._known
    assert " short" in memo._known
