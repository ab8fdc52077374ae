"""ShareGPT: {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", ...}]}, with an optional `system`.

In: a row. Out: an example whose every assistant turn is an answer turn. Must not know: templates, tokenizers.
"""

from __future__ import annotations

from tunesmith.data.formats.fields import BadField, conversation, optional_text, turns_example
from tunesmith.data.types import Example, Message, Row


def to_example(row: Row, *, chat: bool) -> Example:
    """Every known spelling of the roles is read (`fields.ROLES`)."""
    if not chat:
        raise BadField("render", "text", "chat: a list of messages has no text form without a template")
    if "conversations" not in row.fields:
        raise BadField("conversations", "no such key", "a list of turns, [{from, value}, ...]")
    messages = conversation(row.fields["conversations"], "conversations")
    system = optional_text(row.fields, "system")
    if system:
        messages = (Message("system", system), *messages)
    return turns_example(row, messages, "conversations")
