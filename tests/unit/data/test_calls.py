"""Tools, calls and reasoning in the form that a template wants, found by probing; refused in words where it cannot."""

from __future__ import annotations

import json

import pytest

from tests.unit.data.build import CHATML, byte_tokenizer, example, replies, turns
from tunesmith.data.conversation import CallForm, arguments_of, holds, missing_of_call, to_dicts, tool_list
from tunesmith.data.render import SPELLED, Renderer
from tunesmith.data.template import ChatTemplate
from tunesmith.data.tokens import MARK
from tunesmith.data.types import Conversation, Example, Message, RowError, ToolCall

CALLS = (
    "{% if tools %}{{ '<|im_start|>tools\\n' + (tools | tojson) + '<|im_end|>\\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{% if m.reasoning_content %}{{ '(' + m.reasoning_content + ')' }}{% endif %}{{ m['content'] }}"
    "{% for c in m.tool_calls or [] %}{{ '[' + c.function.name + ' ' + (ARGUMENTS) + ']' }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
OBJECT = CALLS.replace("ARGUMENTS", "c.function.arguments | tojson")
TEXT = CALLS.replace("ARGUMENTS", "c.function.arguments")
NINE = OBJECT.replace("{{ '['", "{% if c.id | length != 9 %}{{ raise_exception('nine') }}{% endif %}{{ '['")
TOOLS = json.dumps([{"name": "weather", "description": "d", "parameters": {"type": "object", "properties": {}}}])
CALL = ToolCall("weather", '{"city": "Bern", "days": 3}', "call_abcdef")


def renderer(source: str) -> Renderer:
    return Renderer(byte_tokenizer(), ChatTemplate("test", source), 4096)


def with_tools(prompt: Conversation, answer: Conversation, tools: str = TOOLS) -> Example:
    return Example("f:1", "", prompt, (answer,), tools=tools)


def trained(r: Renderer, row: Example) -> str:
    branch = r.tree(row).branches[0]
    return r.codec.decode(branch.ids[branch.trained].tolist())


@pytest.mark.parametrize(
    ("source", "form"), [(OBJECT, CallForm()), (TEXT, CallForm("text")), (NINE, CallForm(ids="nine"))]
)
def test_the_form_of_calls_is_found_by_probing(source: str, form: CallForm) -> None:
    r = renderer(source)
    assert (r.call_shape.form, r.call_shape.refused, r.call_shape.tools_refused) == (form, "", "")
    row = with_tools(turns("q"), (Message("assistant", "", reasoning="so", calls=(CALL,)),))
    assert trained(r, row) == '(so)[weather {"city": "Bern", "days": 3}]<|im_end|>'
    assert "weather" in r.codec.decode(r.tree(row).prompt_ids.tolist())
    assert r.tree(row).prompt_ids.tolist() == r.prompt_ids(turns("q"), TOOLS)


def test_results_stand_between_turns_untrained() -> None:
    r = renderer(OBJECT)
    answer = (
        Message("assistant", "look", calls=(CALL,)),
        Message("tool", '{"sun": true}'),
        Message("assistant", "Sun."),
    )
    assert (
        trained(r, with_tools(turns("q"), answer))
        == 'look[weather {"city": "Bern", "days": 3}]<|im_end|>Sun.<|im_end|>'
    )


@pytest.mark.parametrize(
    ("source", "row", "message"),
    [
        (CHATML, with_tools(turns("q"), replies("a")), "the row has tools: the chat template drops the tools"),
        (
            CHATML,
            with_tools(turns("q"), (Message("assistant", "", calls=(CALL,)),), ""),
            "the row has tool calls: .* drops",
        ),
        (
            CHATML,
            example(turns("q"), (Message("assistant", "a", reasoning="so"),)),
            "drops the reasoning of the answer",
        ),
        (
            OBJECT.replace("m['content'] }}", "m['content'] if m.role != 'tool' else '' }}"),
            with_tools(
                turns("q"),
                (Message("assistant", "", calls=(CALL,)), Message("tool", "sunny"), Message("assistant", "a")),
            ),
            "drops or changes the result of a tool call",
        ),
        (
            OBJECT.replace("in m.tool_calls or []", "in (m.tool_calls or [])[:1]"),
            with_tools(turns("q"), (Message("assistant", "", calls=(CALL, ToolCall("rain", "{}"))),)),
            "drops a tool call of the answer: the name of the call, 'rain'",
        ),
        (OBJECT, with_tools(turns("q"), (Message("assistant", "", calls=(ToolCall("f", "[1"),)),)), "are not JSON"),
        (OBJECT, with_tools(turns("q"), replies("a"), "{}"), "`tools` is not a JSON list"),
        (
            CHATML.replace("m['content'] +", "m['content'].split('</think>')[-1] +"),
            example(turns("q"), replies("<think>so</think>yes")),
            "strips the reasoning from the very answer that has it",
        ),
    ],
)
def test_what_a_template_drops_is_refused_in_words(source: str, row: Example, message: str) -> None:
    with pytest.raises(RowError, match=message) as error:
        renderer(source).trees(row)
    assert error.value.fatal


def test_reasoning_of_earlier_turns_may_go_from_the_history() -> None:
    source = OBJECT.replace("{% if m.reasoning_content %}", "{% if m.reasoning_content and loop.last %}")
    answer = (
        Message("assistant", "a", reasoning="so"),
        Message("user", "r"),
        Message("assistant", "b", reasoning="thus"),
    )
    r = renderer(source)
    trees = r.trees(example(turns("q"), answer))
    assert [r.codec.decode(tree.branches[0].ids.tolist()) for tree in trees] == ["(so)a<|im_end|>", "(thus)b<|im_end|>"]


def test_a_call_that_ends_by_a_token_of_its_own_gives_another_stop_id() -> None:
    source = OBJECT.replace("{{ '<|im_end|>\\n' }}", "{{ '<end_of_turn>' if m.tool_calls else '<|im_end|>' }}")
    r = renderer(source)
    assert trained(r, with_tools(turns("q"), (Message("assistant", "", calls=(CALL,)),))).endswith("]<end_of_turn>")
    ends = ("<|im_end|>", "<end_of_turn>", "</s>")
    assert r.stop_ids == tuple(sorted(r.tokenizer.convert_tokens_to_ids(list(ends))))


def test_tools_and_arguments_cannot_write_control_tokens() -> None:
    """TRAPS 27, S8."""
    r = renderer(OBJECT)
    evil = ToolCall("weather", json.dumps({"city": "<|im_end|>", "<|im_start|>": ["</s>"]}))
    tools = json.dumps([{"name": "weather", "description": "<|im_end|>"}])
    plain = with_tools(turns("q"), (Message("assistant", "", calls=(CALL,)),))
    spelled = with_tools(turns("q"), (Message("assistant", "", calls=(evil,)),), tools)
    (rendered,) = r.render_many([spelled])
    assert rendered.notices == (SPELLED,)
    counts = [
        r.codec.num_controls([*tree.prompt_ids, *tree.branches[0].ids]) for tree in (*r.trees(plain), *rendered.trees)
    ]
    assert counts[0] == counts[1]


def test_without_sanitizing_content_writes_control_tokens() -> None:
    r = renderer(CHATML)
    (rendered,) = r.render_many([example(turns("a<|im_end|>b"), replies("c"))], sanitize=False)
    end = r.shape.stop_id
    assert rendered.trees[0].prompt_ids.tolist().count(end) == 2
    assert rendered.trees[0].prompt_ids.tolist() == r.prompt_ids(turns("a<|im_end|>b"), sanitize=False)


def test_ids_of_calls_reach_their_results() -> None:
    other = ToolCall("rain", "{}", "x2")
    talk = (
        Message("assistant", "", calls=(CALL, other)),
        Message("tool", "wet", call_id="x2"),
        Message("tool", "sun"),
    )
    own, nine = to_dicts(talk, CallForm()), to_dicts(talk, CallForm(ids="nine"))
    assert [(each["tool_call_id"], each["name"]) for each in own[1:]] == [("x2", "rain"), ("call_abcdef", "weather")]
    assert [(each["tool_call_id"], each["name"]) for each in nine[1:]] == [
        ("call00001", "rain"),
        ("call00000", "weather"),
    ]


def test_what_a_text_holds_by_hand() -> None:
    assert missing_of_call(CALL, 'weather {"city": "Bern", "days": 3}') == ""
    assert missing_of_call(CALL, "weather city Bern days") == "the value of 'days' of weather"
    assert missing_of_call(CALL, "weather Bern 3 days") == "the argument 'city' of weather"
    assert holds('say \\"hi\\"', 'say "hi"')
    assert holds("True", True)
    assert not holds("false", True)
    assert arguments_of(CALL) == {"city": "Bern", "days": 3}
    assert tool_list(TOOLS) == [{"type": "function", "function": json.loads(TOOLS)[0]}]
    assert MARK not in TOOLS
