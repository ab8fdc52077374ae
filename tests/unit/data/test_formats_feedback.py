from __future__ import annotations

import pytest

from tests.unit.data.build import replies, row, rows, source, turns
from tunesmith.data.formats import FORMATS, feedback_of, to_examples
from tunesmith.data.formats.fields import BadField, Degenerate
from tunesmith.data.types import Example, Json
from tunesmith.recipe.models import FormatName


def decode(name: FormatName, fields: dict[str, Json], *, chat: bool = True) -> Example:
    return FORMATS[name].decode(row(**fields), chat=chat)


def bad(name: FormatName, fields: dict[str, Json], *, chat: bool = True) -> str:
    with pytest.raises(BadField) as error:
        decode(name, fields, chat=chat)
    return str(error.value)


def degenerate(name: FormatName, fields: dict[str, Json]) -> str:
    with pytest.raises(Degenerate) as error:
        decode(name, fields)
    return str(error.value)


def said(*messages: tuple[str, str]) -> list[Json]:
    return [{"role": role, "content": content} for role, content in messages]


# --- pairs


@pytest.mark.parametrize(
    "names",
    [
        ("score_chosen", "score_rejected"),
        ("chosen_score", "rejected_score"),
        ("chosen-rating", "rejected-rating"),
        ("chosen_rating", "rejected_rating"),
    ],
)
def test_the_scores_of_a_pair_are_kept(names: tuple[str, str]) -> None:
    fields: dict[str, Json] = {"prompt": "q", "chosen": "a", "rejected": "b", names[0]: 8.5, names[1]: 6}
    assert decode("preference", fields).scores == (8.5, 6.0)
    assert f"`{names[1]}`: found null; wanted a number" in bad("preference", {**fields, names[1]: None})
    assert f'`{names[0]}`: found "N/A"; wanted a number' in bad("preference", {**fields, names[0]: "N/A"})


def test_a_margin_is_the_difference_of_the_scores() -> None:
    fields: dict[str, Json] = {"prompt": "q", "chosen": "a", "rejected": "b", "margin": 1.5}
    assert decode("preference", fields).scores == (1.5, 0.0)
    assert "`margin`: found true; wanted a number" in bad("preference", {**fields, "margin": True})


def test_ultrafeedback_binarized() -> None:
    chosen, rejected = said(("user", "q"), ("assistant", "a")), said(("user", "q"), ("assistant", "b"))
    fields: dict[str, Json] = {
        "prompt": "q",
        "prompt_id": "x",
        "chosen": chosen,
        "rejected": rejected,
        "messages": chosen,
        "score_chosen": 9.0,
        "score_rejected": 4.0,
    }
    result = to_examples(rows(fields), source())
    assert (result.format, result.num_answers, result.unread) == ("preference", 2, ["prompt_id"])
    (example,) = result.examples
    assert (example.prompt, example.answers) == (turns("q"), (replies("a"), replies("b")))
    assert example.scores == (9.0, 4.0)
    del fields["prompt"]
    assert to_examples(rows(fields), source()).examples[0].prompt == turns("q")


def test_messages_are_the_prompt_of_answers_that_bring_none() -> None:
    fields: dict[str, Json] = {"messages": said(("user", "q")), "chosen": "a", "rejected": "b"}
    assert decode("preference", fields).prompt == turns("q")
    answers: dict[str, Json] = {"chosen": said(("assistant", "a"))[0], "rejected": said(("assistant", "b"))[0]}
    assert decode("preference", {**fields, **answers}).answers == (replies("a"), replies("b"))


def test_stack_exchange_prefers_j() -> None:
    fields: dict[str, Json] = {"question": "q", "response_j": "good", "response_k": "bad"}
    example = decode("preference", fields)
    assert (example.prompt, example.answers) == (turns("q"), (replies("good"), replies("bad")))
    assert "`response_k`: found null" in bad("preference", {**fields, "response_k": None})


def test_a_prompt_that_is_a_transcript_becomes_turns() -> None:
    head = "\n\nHuman: q1\n\nAssistant: a1\n\nHuman: q2\n\nAssistant:"
    fields: dict[str, Json] = {"prompt": head, "chosen": " good", "rejected": " bad"}
    example = decode("preference", fields)
    assert (example.prompt, example.answers) == (turns("q1", "a1", "q2"), (replies("good"), replies("bad")))
    raw = decode("preference", fields, chat=False)
    assert (raw.prompt, raw.answers) == (head, (" good", " bad"))


def test_alpaca_pairs_with_history_and_a_system_message() -> None:
    fields: dict[str, Json] = {"instruction": "q2", "history": [["q1", "a1"]], "system": "s", "chosen": "a"}
    example = decode("preference", {**fields, "rejected": "b", "output": "kept apart"})
    assert example.prompt == turns("q1", "a1", "q2", system="s")


def test_a_system_message_stands_before_conversations_that_have_none() -> None:
    chosen, rejected = said(("user", "q"), ("assistant", "a")), said(("user", "q"), ("assistant", "b"))
    for fields in (
        {"system": "s", "chosen": chosen, "rejected": rejected},
        {"system": "s", "prompt": "q", "chosen": chosen, "rejected": rejected},
        {"prompt": said(("system", "s"), ("user", "q")), "chosen": chosen, "rejected": rejected},
    ):
        assert decode("preference", fields).prompt == turns("q", system="s")


# --- ranked


def test_strings_with_scores_stay_in_the_files_order() -> None:
    fields: dict[str, Json] = {"prompt": "q", "responses": ["a", "b", "c"], "scores": [1, 3.5, "2"]}
    example = decode("ranked", fields)
    assert (example.prompt, example.scores) == (turns("q"), (1.0, 3.5, 2.0))
    assert example.answers == (replies("a"), replies("b"), replies("c"))
    raw = decode("ranked", fields, chat=False)
    assert (raw.prompt, raw.answers) == ("q", ("a", "b", "c"))


def test_ranks_are_negated_so_that_higher_is_better() -> None:
    fields: dict[str, Json] = {"messages": said(("system", "s"), ("user", "q")), "candidates": ["a", "b"]}
    example = decode("ranked", {**fields, "ranks": [2, 1]})
    assert (example.prompt, example.scores) == (turns("q", system="s"), (-2.0, -1.0))


@pytest.mark.parametrize("text", ["response", "text", "content", "answer"])
@pytest.mark.parametrize(("score", "sign"), [("score", 1), ("overall_score", 1), ("rating", 1), ("rank", -1)])
def test_objects_hold_text_and_score(text: str, score: str, sign: int) -> None:
    answers: Json = [{text: "a", score: 2.0, "model": "m"}, {text: "b", score: 1.0, "model": "n"}]
    example = decode("ranked", {"instruction": "i", "input": "x", "completions": answers})
    assert (example.prompt, example.scores) == (turns("i\n\nx"), (sign * 2.0, sign * 1.0))
    assert example.answers == (replies("a"), replies("b"))


def test_openbmb_ultrafeedback() -> None:
    completions: Json = [
        {"annotations": {}, "model": "m", "response": "a", "fine-grained_score": 4.5, "overall_score": 8.0},
        {"annotations": {}, "model": "n", "response": "b", "fine-grained_score": 4.75, "overall_score": 6.5},
    ]
    fields: dict[str, Json] = {"source": "s", "instruction": "i", "models": ["m", "n"], "completions": completions}
    result = to_examples(rows(fields, {**fields, "completions": []}), source())
    assert (result.format, result.num_answers) == ("ranked", 0)
    assert result.examples[0].scores == (8.0, 6.5)
    assert [dropped.reason for dropped in result.dropped] == ["fewer than two answers"]


def test_rows_that_rank_nothing_are_degenerate() -> None:
    fields: dict[str, Json] = {"prompt": "q", "responses": ["a", "b"], "scores": [1, 1]}
    assert degenerate("ranked", fields) == "all scores are equal"
    assert degenerate("ranked", {**fields, "responses": ["a"]}) == "fewer than two answers"
    three: dict[str, Json] = {"prompt": "q", "responses": ["a", "a", "a"], "scores": [1, 2, 3]}
    assert degenerate("ranked", three) == "all answers are equal"
    assert degenerate("ranked", {**three, "responses": ["a", " ", "c"]}) == "empty answer"
    assert degenerate("ranked", {**three, "prompt": " ", "responses": ["a", "b", "c"]}) == "empty prompt"


def test_ranked_rows_that_do_not_fit_name_the_field() -> None:
    fields: dict[str, Json] = {"prompt": "q", "responses": ["a", "b"]}
    assert "`scores`: found no such key; wanted a list of numbers beside `responses`" in bad("ranked", fields)
    assert "`scores`: found [1]; wanted a list of 2 numbers" in bad("ranked", {**fields, "scores": [1]})
    assert "`scores[1]`: found null; wanted a number" in bad("ranked", {**fields, "scores": [1, None]})
    assert '`responses`: found "a"; wanted a list of answers' in bad("ranked", {**fields, "responses": "a"})
    assert "`responses`: found no such key" in bad("ranked", {"prompt": "q"})
    assert "`prompt`: found no such key" in bad("ranked", {"responses": ["a", "b"], "scores": [1, 2]})
    objects: Json = [{"text": "a", "score": 1}, {"text": "b"}]
    assert "`responses[1].score`: found null; wanted a number" in bad("ranked", {**fields, "responses": objects})
    assert "`responses[0]`: found 3; wanted a string" in bad("ranked", {**fields, "responses": [3, "b"]})
    assert "`responses[0]`: found {}; wanted an answer in `response`" in bad(
        "ranked", {**fields, "responses": [{}, {}]}
    )


# --- labeled


@pytest.mark.parametrize(
    ("spelled", "label"),
    [
        *((value, True) for value in (True, 1, 1.0, "true", "True", "1", "+1", "thumbs up", "thumbs_up", "Thumbs-Up")),
        *((value, True) for value in ("good", "desirable")),
        *((value, False) for value in (False, 0, -1, "false", "0", "-1", "thumbs down", "bad", "undesirable")),
    ],
)
def test_labels(spelled: Json, label: bool) -> None:
    example = decode("labeled", {"prompt": "q", "completion": "a", "label": spelled})
    assert (example.prompt, example.answers, example.label) == (turns("q"), (replies("a"),), label)


@pytest.mark.parametrize("spelled", [2, 0.5, "maybe", "", [], None, {"label": True}])
def test_labels_that_say_neither(spelled: Json) -> None:
    assert "wanted true or false" in bad("labeled", {"prompt": "q", "completion": "a", "label": spelled})


def test_a_label_judges_the_last_answer() -> None:
    messages = said(("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2"))
    for fields in ({"messages": messages, "label": True}, {"conversations": messages, "kto_tag": True}):
        example = decode("labeled", fields)
        assert (example.prompt, example.answers) == (turns("q1", "a1", "q2"), (replies("a2"),))
    lists: dict[str, Json] = {"prompt": messages[:1], "completion": messages[1:], "label": False}
    assert decode("labeled", lists).answers == (replies("a1", "q2", "a2"),)


def test_other_one_answer_formats_may_have_labels() -> None:
    assert decode("labeled", {"instruction": "i", "input": "x", "output": "o", "label": 1}).prompt == turns("i\n\nx")
    assert decode("labeled", {"question": "q", "response": "a", "label": 1}).prompt == turns("q")
    assert "`completion`: found no such key" in bad("labeled", {"prompt": "q", "label": 1})
    assert "`render`: found text" in bad("labeled", {"messages": [], "label": 1}, chat=False)


# --- files


def labels(*values: bool) -> list[str]:
    fields: list[dict[str, Json]] = [{"prompt": "q", "completion": "a", "label": value} for value in values]
    return feedback_of(to_examples(rows(*fields), source()).examples).notes()


def test_labels_of_one_class_are_told_with_their_number() -> None:
    assert labels(True, False) == []
    assert labels(True, True, True)[0].startswith("WARNING: all 3 labels say the same (3 desirable, 0 undesirable)")
    assert labels(*[True] * 39, False) == ["WARNING: the labels are far from even (39 desirable, 1 undesirable)."]


def test_ties_and_reversed_scores_are_told_with_their_number() -> None:
    pair: dict[str, Json] = {"prompt": "q", "chosen": "a", "rejected": "b"}
    fields: list[dict[str, Json]] = [{**pair, "score_chosen": 5, "score_rejected": score} for score in (1, 5, 5, 9)]
    assert feedback_of(to_examples(rows(*fields), source()).examples).notes() == [
        "WARNING: 2 of 4 pairs have equal scores.",
        "WARNING: 1 of 4 pairs give the rejected answer the higher score.",
    ]
