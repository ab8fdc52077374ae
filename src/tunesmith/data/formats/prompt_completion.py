"""Prompt and completion, as strings or as lists of messages.

In: a row. Out: an example; strings are raw text unless the recipe says chat, message lists are chat.
Must not know: templates, tokenizers.
"""

from __future__ import annotations

from tunesmith.data.formats.fields import (
    BadField,
    chat_example,
    check_order,
    conversation,
    optional_text,
    shown,
    string_example,
    text_field,
)
from tunesmith.data.types import Example, Row


def to_example(row: Row, *, chat: bool) -> Example:
    """Everything in `completion` is the answer, its first turn included."""
    fields = row.fields
    if isinstance(fields.get("prompt"), str):
        system = optional_text(fields, "system")
        completion = text_field(fields, "completion")
        return string_example(row, text_field(fields, "prompt"), (completion,), chat=chat, system=system)
    if "prompt" not in fields or "completion" not in fields:
        missing = "prompt" if "prompt" not in fields else "completion"
        raise BadField(missing, "no such key", "a string or a list of messages")
    if not chat:
        raise BadField("prompt", shown(fields["prompt"]), "a string, since the recipe says `render: text`")
    prompt = conversation(fields["prompt"], "prompt")
    answer = conversation(fields["completion"], "completion")
    check_order((*prompt, *answer), "prompt + completion")
    if answer[0].role != "assistant" or answer[-1].role != "assistant":
        raise BadField("completion", f"{answer[0].role} first, {answer[-1].role} last", "assistant turns at both ends")
    return chat_example(row, prompt, (answer,))
