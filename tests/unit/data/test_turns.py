from __future__ import annotations

from dataclasses import replace

import pytest

from tests.unit.data.build import CHATML, THINKING, byte_tokenizer, example, replies, turns
from tunesmith.data.render import Renderer
from tunesmith.data.template import ChatTemplate, plain_template
from tunesmith.data.turns import TrainOn
from tunesmith.data.types import Branch, Conversation, Message, RowError


def renderer(train_on: TrainOn, source: str = CHATML, *, adds_bos: bool = False) -> Renderer:
    tokenizer = byte_tokenizer(adds_bos=adds_bos)
    return Renderer(tokenizer, ChatTemplate("test", source), 4096, train_on=train_on)


def spans(r: Renderer, branch: Branch) -> list[str]:
    found: list[list[int]] = [[]]
    for token_id, trained in zip(branch.ids.tolist(), branch.trained.tolist(), strict=True):
        if trained:
            found[-1].append(token_id)
        elif found[-1]:
            found.append([])
    return [r.codec.decode(run) for run in found if run]


def weighted(*weights: float | None) -> Conversation:
    """Answers `a0`, `a1`, ... with these weights, and questions between them."""
    answer: list[Message] = []
    for number, weight in enumerate(weights):
        answer += [Message("user", f"q{number}")] if number else []
        answer.append(Message("assistant", f"a{number}", weight=weight))
    return tuple(answer)


def test_the_last_turn_only_with_all_before_it_in_the_prompt() -> None:
    r = renderer("last_assistant")
    tree = r.tree(example(turns("q one"), replies("a one", "q two", "a two")))
    assert spans(r, tree.branches[0]) == ["a two<|im_end|>"]
    assert tree.prompt_ids.tolist() == r.prompt_ids(turns("q one", "a one", "q two"))


def test_weights_train_turns_of_weight_one_and_the_prompt_ends_before_the_first() -> None:
    r = renderer("weights")
    tree = r.tree(example(turns("q"), weighted(0, 1, 0, 1, 0)))
    assert spans(r, tree.branches[0]) == ["a1<|im_end|>", "a3<|im_end|>"]
    assert tree.branches[0].trained[-1]  # what follows the last trained turn is left out
    assert tree.prompt_ids.tolist() == r.prompt_ids((*turns("q"), *weighted(0), Message("user", "q1")))
    beside = r.tree(example(turns("q"), weighted(None, 0)))
    assert spans(r, beside.branches[0]) == ["a0<|im_end|>"]  # without a weight, beside others: 1


@pytest.mark.parametrize(
    ("train_on", "weights", "message", "fatal"),
    [
        ("weights", (None, None), "this row has none", True),
        ("weights", (0, 0), "no trained turn", False),
        ("weights", (1, -0.5), "must be 0 or above", True),
        ("weights", (1, float("nan")), "must be 0 or above", True),
        ("assistant", (1, 0.5), "weight 0.5 and would be trained as the others", True),
        ("assistant", (1, 0), "`train_on: weights` honours it", True),
    ],
)
def test_weights_that_would_not_be_honoured_are_refused(
    train_on: TrainOn, weights: tuple[float | None, ...], message: str, fatal: bool
) -> None:
    with pytest.raises(RowError, match=message) as error:
        renderer(train_on).trees(example(turns("q"), weighted(*weights)))
    assert error.value.fatal == fatal


def test_every_token_of_a_turn_has_the_turns_weight() -> None:
    r = renderer("weights")
    (branch,) = r.tree(example(turns("q"), weighted(0.5, 1, 0, 0.25))).branches
    assert branch.weights is not None
    found = [(r.codec.decode(branch.ids[branch.weights == weight].tolist()), weight) for weight in (0.5, 1.0, 0.25)]
    assert found == [("a0<|im_end|>", 0.5), ("a1<|im_end|>", 1.0), ("a3<|im_end|>", 0.25)]
    assert ((branch.weights > 0) == branch.trained).all()
    assert r.tree(example(turns("q"), weighted(1, 0, 1))).branches[0].weights is None  # 0 and 1 say it by the mask


def test_a_rewriting_template_keeps_the_weight_of_each_turn() -> None:
    trees = renderer("weights", THINKING).trees(example(turns("q"), weighted(0.5, 0, 0.25)))
    found = [tree.branches[0].weights for tree in trees]
    assert [None if each is None else set(each.tolist()) for each in found] == [{0.5}, {0.25}]


def test_weights_on_a_turn_that_is_not_an_answer_are_refused() -> None:
    with pytest.raises(RowError, match="weight 1 on a user turn"):
        renderer("weights").trees(example((Message("user", "q", weight=1),), weighted(1)))


def test_weights_of_pairs_keep_the_shared_prompt() -> None:
    r = renderer("weights")
    tree = r.tree(example(turns("q"), weighted(0, 1), weighted(1, 0, 1)))
    assert tree.prompt_ids.tolist() == r.prompt_ids(turns("q"))
    assert spans(r, tree.branches[0]) == ["a1<|im_end|>"]
    assert spans(r, tree.branches[1]) == ["a0<|im_end|>", "a2<|im_end|>"]


@pytest.mark.parametrize("adds_bos", [False, True])
def test_all_trains_every_token_but_one_that_nothing_predicts(adds_bos: bool) -> None:
    tokenizer = byte_tokenizer(adds_bos=adds_bos)
    r = Renderer(tokenizer, plain_template(tokenizer), 4096, train_on="all")
    tree = r.tree(example(turns("q one", system="s"), replies("a one", "q two", "a two")))
    text = "### System:\ns\n\n### User:\nq one\n\n### Assistant:\na one</s>\n\n"
    text += "### User:\nq two\n\n### Assistant:\na two</s>"
    assert tree.prompt_ids.tolist() == ([0] if adds_bos else [])
    assert tokenizer.decode(tree.branches[0].ids.tolist()) == text
    assert tree.branches[0].trained.tolist() == [adds_bos, *[True] * (len(tree.branches[0].ids) - 1)]


def test_all_of_raw_text_trains_the_prompt_too() -> None:
    r = renderer("all", adds_bos=True)
    tree = r.tree(example("hello ", "world"))
    assert tree.prompt_ids.tolist() == [0]
    assert r.tokenizer.decode(tree.branches[0].ids.tolist()) == "hello world</s>"
    assert tree.branches[0].trained.all()


def test_a_rewriting_template_gives_a_tree_for_each_trained_turn_only() -> None:
    r = renderer("weights", THINKING)
    trees = r.trees(example(turns("q"), weighted(1, 0, 1)))
    assert [spans(r, tree.branches[0]) for tree in trees] == [
        ["<think>\n\n</think>\n\na0<|im_end|>"],
        ["<think>\n\n</think>\n\na2<|im_end|>"],
    ]


def test_raw_prompts_have_no_weights_and_plain_text_needs_none() -> None:
    r = renderer("weights")
    with pytest.raises(RowError, match="raw text has none"):
        r.trees(example("q", "a"))
    assert r.tree(replace(example("", "text"))).num_trained > 0
