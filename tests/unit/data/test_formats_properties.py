"""What holds for every conversation and every row, whatever is in it."""

from __future__ import annotations

import pickle
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.data.build import row, rows, source, turns
from tunesmith.data.formats import (
    FORMATS,
    DegenerateRow,
    decode_row,
    kind_of,
    mixed_error,
    plan_format,
    to_examples,
    unread_columns,
)
from tunesmith.data.types import BadRow, Conversation, Example, Json, Message
from tunesmith.errors import DataError

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
WORDS = TEXTS.filter(lambda text: bool(text.strip()))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from(["", "user", "assistant", "x", "{}", "[1]"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "tool_calls", "name"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)
COLUMNS = (
    "messages conversations prompt completion chosen rejected question answer instruction input output history label "
    "responses scores tools system margin preferred_output non_preferred_output text tags value accepted"
).split()
ROWS = st.dictionaries(st.sampled_from(COLUMNS), JSON, max_size=5)


def as_json(messages: Conversation) -> list[Json]:
    return [{"role": turn.role, "content": turn.content} for turn in messages]


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    """User and assistant in turn, ending with the assistant."""
    count = draw(st.integers(1, 3))
    return turns(*(draw(WORDS) for _ in range(2 * count)))


@settings(max_examples=40, deadline=None)
@given(conversations(), conversations())
def test_prompt_and_answer_are_the_conversation_split_at_a_turn(chosen: Conversation, other: Conversation) -> None:
    """trl#6079 and its kin: a loop's index taken for the length of the shared head."""
    rejected = (chosen[0], *other[1:])
    result = to_examples(rows({"chosen": as_json(chosen), "rejected": as_json(rejected)}), source())
    if chosen == rejected:
        assert [dropped.reason for dropped in result.dropped] == ["chosen equals rejected"]
        return
    (example,) = result.examples
    assert isinstance(example.prompt, tuple)
    for answer, side in zip(example.answers, (chosen, rejected), strict=True):
        assert example.prompt + answer == side
        assert answer[0].role == "assistant"
    assert example.prompt[-1].role == "user"


@settings(max_examples=40, deadline=None)
@given(conversations(), WORDS, WORDS)
def test_transcripts_split_at_the_last_answer(head: Conversation, good: str, worse: str) -> None:
    """trl#1858: a split at the first turn of the person."""
    markers = {"user": "\n\nHuman: ", "assistant": "\n\nAssistant: "}
    head = (*head, Message("user", "and then?"))
    written = "".join(f"{markers[turn.role]}{turn.content}" for turn in head) + "\n\nAssistant:"
    fields: dict[str, Json] = {"chosen": f"{written} {good}", "rejected": f"{written} {worse}"}
    result = to_examples(rows(fields), source(render="text"))
    if good == worse:
        assert len(result.dropped) == 1
        return
    (example,) = result.examples
    assert isinstance(example.prompt, str)
    assert example.prompt == written
    assert [example.prompt + str(answer) for answer in example.answers] == [fields["chosen"], fields["rejected"]]


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [("Paris ", "London"), ("The sky", "The sky is blue"), ("The same.", "The same.")],
)
def test_strings_are_never_split_where_their_characters_part(chosen: str, rejected: str) -> None:
    """TRL's implicit prompt of the first is "Paris", of the second "The sk"; it repeats a turn of the third."""
    with pytest.raises(DataError, match="strings without a prompt: add a `prompt`"):
        to_examples(rows({"chosen": chosen, "rejected": rejected}), source())
    sides = [as_json(turns("q", "a", "q2", answer)) for answer in (chosen, rejected)]
    result = to_examples(rows({"chosen": sides[0], "rejected": sides[1]}), source())
    if chosen == rejected:
        assert [dropped.reason for dropped in result.dropped] == ["chosen equals rejected"]
        return
    (example,) = result.examples
    assert example.prompt == turns("q", "a", "q2")
    assert example.answers == ((Message("assistant", chosen),), (Message("assistant", rejected),))


@settings(max_examples=80, deadline=None)
@given(ROWS)
def test_every_row_gives_an_example_or_says_why_not(fields: dict[str, Json]) -> None:
    name = kind_of(fields)
    for wanted in FORMATS if name is None else [name]:
        try:
            plan = plan_format([row(**fields)], source(format=wanted))
        except DataError:
            continue  # a column that would be lost
        found = decode_row(row(**fields), plan)
        match found:
            case Example():
                assert len(found.answers) == (plan.num_answers or len(found.scores))
            case BadRow():
                assert found.field and found.found and found.wanted
            case DegenerateRow():
                assert found.reason and ":" not in found.reason


@settings(max_examples=40, deadline=None)
@given(st.lists(ROWS, min_size=1, max_size=6))
def test_no_row_is_lost(fields: list[dict[str, Json]]) -> None:
    try:
        result = to_examples(rows(*fields), source())
    except DataError:
        return
    assert len(result.examples) + len(result.bad) + len(result.dropped) == len(fields)


# --- the plan


def test_a_plan_travels_to_worker_processes_and_decodes_there() -> None:
    first, second = rows({"question": "q", "answer": "a"}, {"question": "q", "answer": 3})
    plan = pickle.loads(pickle.dumps(plan_format([first], source())))
    assert (plan.format, plan.reason, plan.chat, plan.num_answers) == (
        "question_answer",
        "1 of 1 rows have `question` and `answer`",
        True,
        1,
    )
    assert isinstance(decode_row(first, plan), Example)
    assert decode_row(second, plan) == BadRow("f:2", "answer", "3", "a string", "2")
    empty = rows({"question": "q", "answer": " "})[0]
    assert decode_row(empty, plan) == DegenerateRow(empty, "empty answer")


def test_a_lost_column_past_the_first_rows_is_a_bad_row() -> None:
    first, second = rows({"text": "t"}, {"text": "t", "images": ["x.png"]})
    plan = plan_format([first], source())
    assert isinstance(decode_row(first, plan), Example)
    bad = BadRow("f:2", "images", '["x.png"]', "no such column (it is not supported yet)", "2")
    assert decode_row(second, plan) == bad


def test_kinds_are_counted_over_a_stream_and_refused() -> None:
    stream: list[dict[str, Json]] = [{"text": "t"}] * 3 + [{"prompt": "p", "completion": "c", "label": 1}]
    kinds = Counter(kind_of(fields) for fields in stream)
    assert "several formats: 3 text, 1 labeled" in str(mixed_error(kinds, "f"))


def test_columns_that_are_not_read_are_named() -> None:
    assert unread_columns(["instruction", "output", "tags", "id", "model"], "alpaca") == ["id", "model"]
