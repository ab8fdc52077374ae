from __future__ import annotations

import json

import pytest

from tests.unit.data.build import row, rows, source, turns
from tunesmith.data.formats import FORMATS, to_examples
from tunesmith.data.formats.fields import BadField
from tunesmith.data.types import Example, Json, Message, ToolCall
from tunesmith.recipe.models import FormatName

WEATHER: dict[str, Json] = {"name": "weather", "description": "d", "parameters": {"type": "object", "properties": {}}}
OPENAI: Json = [{"type": "function", "function": WEATHER}]
ASK: dict[str, Json] = {"role": "user", "content": "q"}
DONE: dict[str, Json] = {"role": "assistant", "content": "done"}
LISBON = ToolCall("weather", '{"city": "Lisbon"}', "c1")
PORTO = ToolCall("weather", '{"city": "Porto"}', "c2")


def decode(name: FormatName, fields: dict[str, Json], *, chat: bool = True) -> Example:
    return FORMATS[name].decode(row(**fields), chat=chat)


def bad(name: FormatName, fields: dict[str, Json], *, chat: bool = True) -> str:
    with pytest.raises(BadField) as error:
        decode(name, fields, chat=chat)
    return str(error.value)


def call(arguments: Json, *, call_id: str = "c1") -> dict[str, Json]:
    return {"id": call_id, "type": "function", "function": {"name": "weather", "arguments": arguments}}


def asked(*messages: Json) -> dict[str, Json]:
    return {"messages": [ASK, *messages]}


# --- OpenAI


@pytest.mark.parametrize("arguments", ['{"city": "Lisbon"}', '{"city":"Lisbon"}', {"city": "Lisbon"}])
def test_openai_calls_and_their_results(arguments: Json) -> None:
    calling: Json = {"role": "assistant", "content": None, "tool_calls": [call(arguments)]}
    result: Json = {"role": "tool", "tool_call_id": "c1", "content": "sunny"}
    example = decode("messages", asked(calling, result, DONE))
    assert example.prompt == turns("q")
    assert example.answers == (
        (
            Message("assistant", "", calls=(LISBON,)),
            Message("tool", "sunny", name="weather", call_id="c1"),
            Message("assistant", "done"),
        ),
    )


def test_parallel_calls_are_answered_by_id_in_any_order() -> None:
    calls: Json = [call({"city": "Lisbon"}), call({"city": "Porto"}, call_id="c2")]
    results: list[Json] = [{"role": "tool", "tool_call_id": name, "content": name} for name in ("c2", "c1")]
    example = decode("messages", asked({"role": "assistant", "tool_calls": calls}, *results, DONE))
    (answer,) = example.answers
    assert isinstance(answer, tuple)
    assert answer[0].calls == (LISBON, PORTO)
    assert [turn.call_id for turn in answer[1:3]] == ["c2", "c1"]


def test_the_legacy_function_call() -> None:
    calling: Json = {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": "{}"}}
    result: Json = {"role": "function", "name": "weather", "content": "sunny"}
    example = decode("messages", {**asked(calling, result, DONE), "functions": [WEATHER]})
    (answer,) = example.answers
    assert isinstance(answer, tuple)
    assert answer[0].calls == (ToolCall("weather", "{}"),)
    assert answer[1] == Message("tool", "sunny", name="weather")
    assert json.loads(example.tools) == OPENAI


def test_a_conversation_may_end_with_a_call_and_a_call_may_have_text() -> None:
    calling: Json = {"role": "assistant", "content": "let me see", "tool_calls": [call("{}")]}
    (answer,) = decode("messages", asked(calling)).answers
    assert answer == (Message("assistant", "let me see", calls=(ToolCall("weather", "{}", "c1"),)),)


@pytest.mark.parametrize(
    "spelled", [OPENAI, json.dumps(OPENAI), [WEATHER], json.dumps([WEATHER]), [json.dumps(WEATHER)]]
)
def test_tools_in_every_spelling_become_openai_json(spelled: Json) -> None:
    example = decode("messages", {**asked(DONE), "tools": spelled})
    assert json.loads(example.tools) == OPENAI
    assert list(json.loads(example.tools)[0]["function"]) == ["name", "description", "parameters"]


@pytest.mark.parametrize("nothing", [None, "", "[]", [], "null"])
def test_no_tools(nothing: Json) -> None:
    assert decode("messages", {**asked(DONE), "tools": nothing}).tools == ""


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_stands_beside_the_content(key: str) -> None:
    (answer,) = decode("messages", asked({**DONE, key: "hmm"})).answers
    assert answer == (Message("assistant", "done", reasoning="hmm"),)


# --- ShareGPT


def talk(*messages: tuple[str, Json]) -> dict[str, Json]:
    return {"conversations": [{"from": role, "value": value} for role, value in messages]}


CALL_TEXT = '{"name": "weather", "arguments": {"city": "Lisbon"}}'
BARE = ToolCall("weather", '{"city": "Lisbon"}')


@pytest.mark.parametrize("calling", ["function_call", "tool_call", "function-call"])
@pytest.mark.parametrize("result", ["observation", "tool_response", "function-response", "tool"])
@pytest.mark.parametrize("value", [CALL_TEXT, f"[{CALL_TEXT}]", json.loads(CALL_TEXT)])
def test_call_turns_are_calls(calling: str, result: str, value: Json) -> None:
    fields = talk(("human", "q"), (calling, value), (result, "sunny"), ("gpt", "done"))
    example = decode("sharegpt", {**fields, "tools": json.dumps([WEATHER])})
    assert example.answers == (
        (
            Message("assistant", "", calls=(BARE,)),
            Message("tool", "sunny", name="weather"),
            Message("assistant", "done"),
        ),
    )
    assert json.loads(example.tools) == OPENAI


def test_a_call_turn_after_text_is_part_of_that_turn() -> None:
    fields = talk(("human", "q"), ("gpt", "let me see"), ("function_call", CALL_TEXT), ("function_call", CALL_TEXT))
    assert decode("sharegpt", fields).answers == ((Message("assistant", "let me see", calls=(BARE, BARE)),),)


def test_two_text_turns_in_a_row_stay_an_error() -> None:
    assert "role assistant after assistant" in bad("sharegpt", talk(("human", "q"), ("gpt", "a"), ("gpt", "b")))
    assert "`conversations[0]`: found role assistant first" in bad("sharegpt", talk(("gpt", "a"), ("human", "q")))


def test_toolalpaca_instances() -> None:
    step: Json = [["weather", '{"city": "Lisbon"}', "I look it up.\nAction: weather\nAction Input: ..."], "sunny"]
    example = decode("messages", {"input": "q", "intermediate_steps": [step], "output": "done"})
    assert example.prompt == turns("q")
    assert example.answers == (
        (
            Message("assistant", "I look it up.", calls=(BARE,)),
            Message("tool", "sunny", name="weather"),
            Message("assistant", "done"),
        ),
    )
    fields: dict[str, Json] = {"input": "q", "intermediate_steps": [["weather"]], "output": "done"}
    assert '`intermediate_steps[0]`: found ["weather"]' in bad("messages", fields)


# --- pairs


def test_openai_pairs_with_tools() -> None:
    fields: dict[str, Json] = {
        "input": {"messages": [ASK], "tools": OPENAI, "parallel_tool_calls": True},
        "preferred_output": [{"role": "assistant", "tool_calls": [call("{}")]}],
        "non_preferred_output": [{"role": "assistant", "content": "no idea"}],
    }
    example = decode("preferred_output", fields)
    assert json.loads(example.tools) == OPENAI
    first = (Message("assistant", "", calls=(ToolCall("weather", "{}", "c1"),)),)
    assert example.answers == (first, (Message("assistant", "no idea"),))


def test_calls_tell_answers_apart_and_their_ids_do_not() -> None:
    fields: dict[str, Json] = {"prompt": [ASK], "chosen": {"role": "assistant", "tool_calls": [call("{}")]}}
    other: Json = {"role": "assistant", "tool_calls": [call({"city": "Porto"})]}
    assert len(decode("preference", {**fields, "rejected": other}).answers) == 2
    again: Json = {"role": "assistant", "tool_calls": [call("{}", call_id="c9")]}
    result = to_examples(rows({**fields, "rejected": again}), source())
    assert [dropped.reason for dropped in result.dropped] == ["chosen equals rejected"]


# --- refusals

CALLING: Json = {"role": "assistant", "tool_calls": [call("{}")]}
RESULT: Json = {"role": "tool", "tool_call_id": "c1", "content": "r"}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([DONE, RESULT], "`messages[2]`: found role tool after assistant, without a call; wanted the assistant's call"),
        ([RESULT], "`messages[1]`: found role tool after user, without a call"),
        (
            [CALLING, {**RESULT, "tool_call_id": "c7"}],
            '`messages[2].tool_call_id`: found "c7"; wanted the id of a call',
        ),
        ([CALLING, RESULT, RESULT, DONE], '`messages[3].tool_call_id`: found "c1"; wanted the id of a call before it'),
        (
            [CALLING, {"role": "tool", "content": "r"}, {"role": "tool", "content": "r"}, DONE],
            "`messages[3]`: found one tool result more than there are calls",
        ),
        ([CALLING, ASK], "`messages[2]`: found role user after a call; wanted tool"),
        ([CALLING, DONE], "`messages[2]`: found role assistant after a call; wanted tool"),
        ([CALLING, RESULT, ASK], "`messages[3]`: found role user after tool; wanted assistant or tool"),
        ([CALLING, RESULT], "found the last message is from tool, so nothing would be trained"),
        ([{"role": "assistant", "tool_calls": [1]}], "`messages[1].tool_calls[0]`: found 1; wanted a call"),
        ([{"role": "assistant", "tool_calls": "x"}], '`messages[1].tool_calls`: found "x"; wanted a list of calls'),
        ([{"role": "assistant", "tool_calls": [call("[1]")]}], '.arguments`: found "[1]"; wanted a JSON object'),
        ([{"role": "assistant", "tool_calls": [call("Lisbon")]}], '.arguments`: found "Lisbon"; wanted a JSON object'),
        ([{"role": "assistant", "tool_calls": [call('{"a": NaN}')]}], "; wanted a JSON object"),
        ([{"role": "assistant", "tool_calls": [call('{"a": "\\ud800"}')]}], "; wanted a JSON object"),
        ([{"role": "assistant", "tool_calls": [call("[" * 5000)]}], "; wanted a JSON object"),
        ([{"role": "assistant", "tool_calls": [{"function": {"arguments": {}}}]}], ".name`: found no such key"),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": "w"}}]}], ".arguments`: found no such key"),
        ([{"role": "assistant", "tool_calls": [{"type": "custom", "id": "x"}]}], '.type`: found "custom"'),
        ([{"role": "user", "content": "x", "tool_calls": [call("{}")]}], "found calls of user"),
        ([{"role": "assistant", "content": None}], "`messages[1].content`: found null; wanted a string"),
        ([{**DONE, "thinking": 3}], "`messages[1].thinking`: found 3; wanted a string"),
        ([{**DONE, "thinking": "a", "reasoning": "b"}], "found different texts in reasoning and thinking"),
    ],
)
def test_calls_that_do_not_fit_name_the_field(messages: list[Json], message: str) -> None:
    assert message in bad("messages", asked(*messages))


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ("{", '`tools`: found "{"; wanted a list of tools, or its JSON text'),
        ({"name": "weather"}, "`tools`: found "),
        ([3], "`tools[0]`: found 3; wanted a tool"),
        ([{"description": "d"}], "`tools[0].name`: found no such key"),
        ([{"type": "function", "function": "weather"}], '`tools[0].name`: found "weather"'),
        ([{"name": 3}], "`tools[0].name`: found 3"),
    ],
)
def test_tools_that_do_not_fit_name_the_field(tools: Json, message: str) -> None:
    assert message in bad("messages", {**asked(DONE), "tools": tools})


def test_a_call_turn_that_holds_no_call() -> None:
    for value, found in (("call it", '"call it"'), ("3", "3"), ("[]", "[]"), (None, "null")):
        assert f"`conversations[1].value`: found {found}" in bad("sharegpt", talk(("human", "q"), ("tool_call", value)))


def test_raw_text_offers_no_tools() -> None:
    fields: dict[str, Json] = {"prompt": "p", "completion": "c", "tools": OPENAI}
    assert "wanted none, or `render: chat`: raw text offers no tools" in bad("prompt_completion", fields, chat=False)
    assert json.loads(decode("prompt_completion", fields).tools) == OPENAI


# --- weights


@pytest.mark.parametrize(("key", "value"), [("weight", 0), ("loss_weight", 0.0), ("train", False), ("training", False)])
def test_weights_are_kept(key: str, value: Json) -> None:
    example = decode("messages", asked({**DONE, key: value}, {**ASK, key: value}, {**DONE, key: 1}))
    (answer,) = example.answers
    assert isinstance(answer, tuple)
    assert [turn.weight for turn in answer] == [0.0, 0.0, 1.0]
    assert [type(turn.weight) for turn in answer] == [float] * 3


def test_a_weight_may_be_a_fraction() -> None:
    (answer,) = decode("messages", asked({**DONE, "weight": 0.25})).answers
    assert [turn.weight for turn in answer if isinstance(turn, Message)] == [0.25]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{**DONE, "weight": -0.5}], "`messages[1].weight`: found -0.5; wanted a number from 0 to 100"),
        ([{**DONE, "weight": 101}], "`messages[1].weight`: found 101; wanted a number from 0 to 100"),
        ([{**DONE, "weight": "1"}], '`messages[1].weight`: found "1"; wanted a number from 0 to 100'),
        ([{**DONE, "weight": 1, "train": False}], "`messages[1].train`: found false; wanted the same as `weight`"),
        ([DONE, {**ASK, "weight": 1}], "`messages[2].weight`: found 1; wanted 0 for user: only assistant turns"),
    ],
)
def test_weights_that_do_not_fit_name_the_field(messages: list[Json], message: str) -> None:
    assert message in bad("messages", asked(*messages))


def test_a_turn_and_its_call_turn_have_one_weight() -> None:
    values: Json = [
        {"from": "human", "value": "q"},
        {"from": "gpt", "value": "let me see", "weight": 0},
        {"from": "function_call", "value": CALL_TEXT, "weight": 1},
    ]
    assert "wanted one weight for a turn and its calls" in bad("sharegpt", {"conversations": values})
