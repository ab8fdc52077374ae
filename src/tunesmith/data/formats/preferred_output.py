"""OpenAI's preference format: {"input": {"messages": [...]}, "preferred_output": [...], "non_preferred_output": [...]}.

In: a row, with optional `tools` in its input or beside it (`parallel_tool_calls` is a setting of OpenAI's service).
Out: an example with two answers, the preferred one first. Must not know: templates, tokenizers.
"""

from __future__ import annotations

from tunesmith.data.formats.calls import tools_of
from tunesmith.data.formats.examples import check_text_render, pair_example
from tunesmith.data.formats.fields import BadField
from tunesmith.data.formats.turns import answer_turns, conversation
from tunesmith.data.types import Conversation, Example, Json, Message, Row

SIDES = ("preferred_output", "non_preferred_output")
KEYS = ("input", *SIDES)


def to_example(row: Row, *, chat: bool) -> Example:
    """`input` is an object with messages, a list of them, or a string."""
    check_text_render(row.fields, chat=chat)
    for name in KEYS:
        if row.fields.get(name) is None:
            raise BadField(name, "null" if name in row.fields else "no such key", "messages")
    value = row.fields["input"]
    prompt = _input(value)
    chosen, rejected = (answer_turns(row.fields[name], name) for name in SIDES)
    tools = tools_of(value.get("tools"), "input.tools") if isinstance(value, dict) else ""
    return pair_example(row, (*prompt, *chosen), (*prompt, *rejected), names=SIDES, tools=tools)


def _input(value: Json) -> Conversation:
    if isinstance(value, str):
        return (Message("user", value),)
    if not isinstance(value, dict) or "role" in value:
        return conversation(value, "input")
    return conversation(value.get("messages"), "input.messages")
