"""Over-long rows: whole turns are left out, or the row is dropped with a reason. TRAPS 28, 29, 30; PEERS 4, 5."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.data.build import CHATML, THINKING, byte_tokenizer, example, replies, turns
from tunesmith.data.render import Rendered, Renderer, TooLong
from tunesmith.data.template import ChatTemplate
from tunesmith.data.trim import split_ids
from tunesmith.data.types import Conversation, RowError

TOKENIZERS = {False: byte_tokenizer(), True: byte_tokenizer(adds_bos=True)}
POLICIES: tuple[TooLong, ...] = ("drop", "truncate_prompt_start", "truncate_answer", "split")
words = st.integers(1, 12).map(lambda count: "x" * count)  # one token a letter: lengths are what the test says


@cache
def renderer(limit: int, too_long: TooLong, source: str = CHATML, *, adds_bos: bool = False) -> Renderer:
    return Renderer(TOKENIZERS[adds_bos], ChatTemplate("test", source), limit, too_long=too_long)


def render(r: Renderer, prompt: Conversation | str, *answers: Conversation | str) -> Rendered:
    (rendered,) = r.render_many([example(prompt, *answers)])
    return rendered


def text_of(r: Renderer, ids: object) -> str:
    return r.codec.decode(list(ids))  # type: ignore[call-overload]


def check(r: Renderer, rendered: Rendered) -> None:
    """What holds for every row, whatever was left out of it."""
    if rendered.error is not None:
        assert rendered.error.what.startswith(("longer than max_length: ", "chosen equals rejected"))
        return
    assert rendered.num_tokens > r.max_length or not rendered.trimmed
    for tree in rendered.trees:
        for branch in tree.branches:
            assert len(tree.prompt_ids) + len(branch.ids) <= r.max_length
            assert branch.trained.any()


@settings(max_examples=120)
@given(
    prompt=st.lists(words, min_size=1, max_size=5).filter(lambda texts: len(texts) % 2 == 1),
    chosen=st.lists(words, min_size=1, max_size=5).filter(lambda texts: len(texts) % 2 == 1),
    rejected=st.lists(words, min_size=1, max_size=5).filter(lambda texts: len(texts) % 2 == 1),
    system=st.sampled_from(["", "sss"]),
    limit=st.integers(2, 120),
    too_long=st.sampled_from(POLICIES),
)
def test_any_pair_is_whole_turns_within_the_limit_or_dropped_with_a_reason(
    prompt: list[str], chosen: list[str], rejected: list[str], system: str, limit: int, too_long: TooLong
) -> None:
    """TRAPS 29, 30; PEERS 4: the header, the question before an answer and every terminator stay."""
    r = renderer(limit, too_long)
    rendered = render(r, turns(*prompt, system=system), replies(*chosen), replies(*rejected))
    check(r, rendered)
    for tree in rendered.trees:
        shown = text_of(r, tree.prompt_ids)
        head = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
        tails = [turns(*prompt[start:], system=system) for start in range(0, len(prompt), 2)]
        assert shown in [text_of(r, r.prompt_ids(tail)) for tail in tails]
        assert shown.startswith(f"{head}<|im_start|>user\n")
        assert shown.endswith(f"{prompt[-1]}<|im_end|>\n<|im_start|>assistant\n")
        for branch, answer in zip(tree.branches, (chosen, rejected), strict=True):
            wholes = [answer[: end + 1] for end in range(0, len(answer), 2)]
            inner = text_of(r, branch.ids)
            assert inner in [
                text_of(r, full.branches[0].ids) for kept in wholes for full in _alone(prompt, system, kept)
            ]
            assert branch.ids[-1] == r.shape.stop_id
            assert branch.trained[-1]


def _alone(prompt: list[str], system: str, answer: list[str]) -> list:  # type: ignore[type-arg]
    return list(renderer(10_000, "drop").trees(example(turns(*prompt, system=system), replies(*answer))))


@settings(max_examples=120)
@given(
    prompt=st.integers(0, 40),
    chosen=st.integers(1, 40),
    rejected=st.integers(1, 40),
    limit=st.integers(2, 40),
    too_long=st.sampled_from(POLICIES),
    adds_bos=st.booleans(),
)
def test_raw_text_of_any_size_keeps_its_end_and_its_bos(
    prompt: int, chosen: int, rejected: int, limit: int, too_long: TooLong, adds_bos: bool
) -> None:
    """TRAPS 29: all sizes up to 40; an answer has at least one token, or the row is dropped."""
    r = renderer(limit, too_long, adds_bos=adds_bos)
    rendered = render(r, "p" * prompt, "c" * chosen, "r" * rejected)
    check(r, rendered)
    for tree in rendered.trees:
        assert tree.prompt_ids.tolist()[:1] == ([0] if adds_bos else tree.prompt_ids.tolist()[:1])
        kept = len(tree.prompt_ids) - adds_bos
        assert text_of(r, tree.prompt_ids) == "<s>" * adds_bos + "p" * kept
        assert (kept == prompt) or (too_long == "truncate_prompt_start" and 0 < kept < prompt)
        assert [text_of(r, branch.ids) for branch in tree.branches] == ["c" * chosen + "</s>", "r" * rejected + "</s>"]


@settings(max_examples=200)
@given(st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=60), st.integers(2, 20), st.booleans())
def test_split_text_loses_nothing_and_ends_once(text: str, limit: int, adds_bos: bool) -> None:
    r = renderer(limit, "split", adds_bos=adds_bos)
    rendered = render(r, "", text)
    if rendered.error is not None:
        assert "U+FDD0" in rendered.error.what or (limit == 2 and "leaves no room for parts" in rendered.error.what)
        return
    check(r, rendered)
    ids = [token_id for tree in rendered.trees for token_id in tree.branches[0].ids.tolist()]
    whole = renderer(10_000, "drop", adds_bos=adds_bos).tree(example("", text))
    assert ids == whole.branches[0].ids.tolist()
    assert [tree.branches[0].ids.tolist().count(r.codec.eos_id) for tree in rendered.trees][:-1] == [0] * (
        len(rendered.trees) - 1
    )
    assert all(tree.prompt_ids.tolist() == ([0] if adds_bos else []) for tree in rendered.trees)
    assert (rendered.trimmed != "") == (len(rendered.trees) > 1)


def test_split_pieces_by_hand() -> None:
    assert split_ids([1, 2, 3, 4, 5], room=2, least=1) == [[1, 2], [3, 4], [5]]
    assert split_ids([1, 2, 3, 4, 5, 6, 7], room=3, least=2) == [[1, 2, 3], [4, 5], [6, 7]]


def test_the_oldest_turns_of_the_prompt_go_first_and_the_system_message_stays() -> None:
    prompt = turns("old " * 20, "a", "newer " * 3, "b", "newest", system="be good")
    r = renderer(80, "truncate_prompt_start")
    rendered = render(r, prompt, replies("yes"))
    assert rendered.trimmed == "oldest turns of the prompt left out: 2"
    assert rendered.num_tokens > 80
    assert rendered.trees[0].prompt_ids.tolist() == r.prompt_ids((prompt[0], *prompt[3:]))


def test_the_last_turns_of_the_answer_go_and_the_terminator_stays() -> None:
    answer = replies("a one", "q two", "a two", "q " * 60, "a three")
    r = renderer(60, "truncate_answer")
    rendered = render(r, turns("q"), answer)
    assert rendered.trimmed == "last turns of the answer left out: 2"
    assert text_of(r, rendered.trees[0].branches[0].ids).endswith("a two<|im_end|>")


def test_pairs_that_are_equal_after_truncation_are_dropped_with_their_own_reason() -> None:
    """PEERS 5, TRAPS 28: they would stay in the data with a gradient of zero."""
    r = renderer(40, "truncate_answer")
    rendered = render(r, turns("q"), replies("same", "go on " * 9, "good"), replies("same", "go on " * 9, "bad"))
    assert rendered.error is not None
    assert (rendered.error.what, rendered.error.fatal) == ("chosen equals rejected after truncation", False)


def test_what_does_not_fit_even_so_is_dropped_with_a_reason_that_says_so() -> None:
    for too_long in ("truncate_prompt_start", "truncate_answer"):
        rendered = render(renderer(30, too_long), turns("q " * 40), replies("a"))  # type: ignore[arg-type]
        assert rendered.error is not None
        assert f"no turn that may be left out ({too_long}) makes it fit" in rendered.error.what
        assert rendered.error.num_tokens > 30


def test_stop_is_fatal() -> None:
    rendered = render(renderer(10, "stop"), turns("q"), replies("a " * 20))
    assert rendered.error is not None
    assert rendered.error.fatal


def test_a_rewriting_template_is_truncated_turn_by_turn() -> None:
    talk = example(turns("one " * 12), replies("a one", "two", "a two"))
    whole, _ = renderer(1000, "drop", THINKING).trees(talk)
    r = renderer(whole.num_tokens, "truncate_prompt_start", THINKING)
    (rendered,) = r.render_many([talk])
    first, second = rendered.trees
    assert (first.id, second.id) == ("f:1#turn1", "f:1#turn2")
    assert second.prompt_ids.tolist() == r.prompt_ids(turns("two"))
    assert rendered.trimmed == "oldest turns of the prompt left out: 2"


def test_a_huge_row_is_truncated_without_tokenizing_what_is_left_out() -> None:
    r = renderer(64, "truncate_prompt_start")
    rendered = render(r, turns("a" * 2_000_000, "b", "q"), replies("yes"))
    assert rendered.trimmed == "oldest turns of the prompt left out: 2"


def test_raw_pairs_are_not_cut_at_the_end() -> None:
    with pytest.raises(RowError, match="raw text would lose its end"):
        renderer(10, "truncate_answer").trees(example("q", "a" * 30))
