"""OpenAI's preference format: {"input": {"messages": [...]}, "preferred_output": [...], "non_preferred_output": [...]}.

In: a row. Out: an example with two answers, the preferred one first. Must not know: templates, tokenizers.
"""

from __future__ import annotations

from tunesmith.data.formats.fields import BadField, conversation, pair_example, shown
from tunesmith.data.types import Conversation, Example, Json, Message, Row


def to_example(row: Row, *, chat: bool) -> Example:
    """`input` is an object with messages, a list of them, or a string."""
    if not chat:
        raise BadField("render", "text", "chat: a list of messages has no text form without a template")
    for name in ("input", "preferred_output", "non_preferred_output"):
        if row.fields.get(name) is None:
            raise BadField(name, "null" if name in row.fields else "no such key", "messages")
    prompt = _input(row.fields["input"])
    chosen = _output(row.fields["preferred_output"], "preferred_output")
    rejected = _output(row.fields["non_preferred_output"], "non_preferred_output")
    return pair_example(row, (*prompt, *chosen), (*prompt, *rejected))


def _input(value: Json) -> Conversation:
    if isinstance(value, str):
        return (Message("user", value),)
    if not isinstance(value, dict) or "role" in value:
        return conversation(value, "input")
    if value.get("tools"):
        raise BadField("input.tools", shown(value["tools"]), "no tools (they are not supported yet)")
    return conversation(value.get("messages"), "input.messages")


def _output(value: Json, name: str) -> Conversation:
    return (Message("assistant", value),) if isinstance(value, str) else conversation(value, name)
