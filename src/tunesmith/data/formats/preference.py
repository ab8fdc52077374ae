"""Pairs: a prompt with a chosen and a rejected answer, in the spellings that are in use.

In: a row. The prompt is `prompt` (string or messages), `question` with `system` (orca_dpo_pairs),
`instruction` with `input` (Alpaca style; its `output` is not read), or `conversations` (LLaMA-Factory);
or it is missing, and chosen and rejected are whole conversations with a shared head.
Out: an example with two answers, chosen first. Must not know: templates, tokenizers.
"""

from __future__ import annotations

from tunesmith.data.formats.alpaca import instruction
from tunesmith.data.formats.fields import (
    BadField,
    Fields,
    conversation,
    optional_text,
    pair_example,
    shown,
    string_example,
    text_field,
)
from tunesmith.data.types import Conversation, Example, Message, Row


def to_example(row: Row, *, chat: bool) -> Example:
    """Strings give one turn a side; message lists may repeat the prompt and may go on for several turns."""
    prompt = _prompt(row.fields)
    chosen, rejected = _side(row.fields, "chosen"), _side(row.fields, "rejected")
    system = optional_text(row.fields, "system")
    if isinstance(chosen, str) and isinstance(rejected, str) and isinstance(prompt, str):
        return string_example(row, prompt, (chosen, rejected), chat=chat, system=system)
    if not chat:
        raise BadField("prompt", "messages", "strings, since the recipe says `render: text`")
    head = _head(prompt, system)
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadField("rejected", shown(row.fields["rejected"]), "the same form as `chosen`: both strings or messages")
    return pair_example(row, _whole(head, chosen, "chosen"), _whole(head, rejected, "rejected"))


def _prompt(fields: Fields) -> str | Conversation | None:
    if fields.get("conversations") is not None:
        return conversation(fields["conversations"], "conversations")
    value = fields.get("prompt")
    if value is not None:
        return value if isinstance(value, str) else conversation(value, "prompt")
    if fields.get("question") is not None:
        return text_field(fields, "question")
    return instruction(fields) if fields.get("instruction") is not None else None


def _side(fields: Fields, name: str) -> str | Conversation:
    if name not in fields:
        raise BadField(name, "no such key", "an answer: a string or a list of messages")
    value = fields[name]
    if value is None:
        raise BadField(name, "null", "an answer: a string or a list of messages")
    return value if isinstance(value, str) else conversation(value, name)


def _head(prompt: str | Conversation | None, system: str) -> Conversation:
    turns = (Message("user", prompt),) if isinstance(prompt, str) else prompt or ()
    return (Message("system", system), *turns) if system else turns


def _whole(head: Conversation, side: str | Conversation, name: str) -> Conversation:
    """The side as a whole conversation, prompt first."""
    if isinstance(side, str):
        if not head:
            raise BadField("prompt", "no such key", "a prompt, since `chosen` and `rejected` are strings")
        return (*head, Message("assistant", side))
    if side[0].role == "assistant":
        if not head:
            raise BadField("prompt", "no such key", f"a prompt, since `{name}` begins with the assistant's turn")
        return (*head, *side)
    if not _repeats(side, head):
        raise BadField(name, "messages that begin with another prompt", "the prompt's turns first, or the answer only")
    return side


def _repeats(side: Conversation, head: Conversation) -> bool:
    """Whether the side begins with the prompt's turns; a system message of its own may come first."""
    start = 1 if side[0].role == "system" and (not head or head[0].role != "system") else 0
    found = side[start : start + len(head)]
    return _stripped(found) == _stripped(head)


def _stripped(messages: Conversation) -> list[tuple[str, str]]:
    return [(message.role, message.content.strip()) for message in messages]
