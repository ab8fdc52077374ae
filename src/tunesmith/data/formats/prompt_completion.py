"""Prompt and completion, as strings or as lists of messages.

In: a row. Out: an example; strings are raw text unless the recipe says chat, message lists are chat.
Must not know: templates, tokenizers.
"""

from __future__ import annotations

from tunesmith.data.formats.examples import chat_example, string_example
from tunesmith.data.formats.fields import BadField, Fields, shown, system_text, text_field
from tunesmith.data.formats.turns import answer_turns, conversation, ordered, with_system
from tunesmith.data.types import Conversation, Example, Message, Row


def to_example(row: Row, *, chat: bool) -> Example:
    """Everything in `completion` is the answer, its first turn included."""
    fields = row.fields
    for name in ("prompt", "completion"):
        if fields.get(name) is None:
            raise BadField(name, "null" if name in fields else "no such key", "a string or a list of messages")
    if not has_messages(fields):
        system, completion = system_text(fields), text_field(fields, "completion")
        return string_example(row, text_field(fields, "prompt"), (completion,), chat=chat, system=system)
    if not chat:
        raise BadField("prompt", shown(fields["prompt"]), "a string, since the recipe says `render: text`")
    prompt = with_system(system_text(fields), _prompt(fields))
    answer = answer_turns(fields["completion"], "completion")
    whole = ordered((*prompt, *answer), "prompt + completion")
    if answer[0].role != "assistant" or answer[-1].role != "assistant":
        raise BadField("completion", f"{answer[0].role} first, {answer[-1].role} last", "assistant turns at both ends")
    return chat_example(row, whole[: len(prompt)], (whole[len(prompt) :],))


def has_messages(fields: Fields) -> bool:
    """Whether a side is messages, not a string."""
    return any(isinstance(fields.get(name), list | dict) for name in ("prompt", "completion"))


def _prompt(fields: Fields) -> Conversation:
    value = fields["prompt"]
    return (Message("user", value),) if isinstance(value, str) else conversation(value, "prompt")
