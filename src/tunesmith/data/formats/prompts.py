"""The prompt of rows with several answers: a string, messages, or the head of a transcript.

In: a row's fields. Out: the prompt, and whole conversations made of it and an answer. Raises BadField.
Must not know: how many answers there are, templates, tokenizers.
"""

from __future__ import annotations

from tunesmith.data.formats.alpaca import history, instruction
from tunesmith.data.formats.fields import BadField, Fields, present, system_text, text_field
from tunesmith.data.formats.transcripts import prompt_turns
from tunesmith.data.formats.turns import conversation, with_system
from tunesmith.data.types import Conversation, Message

MESSAGE_LISTS = ("conversations", "conversation", "messages")
STRINGS = ("prompt", "question", "instruction", "query", "input")
NAMES = ("conversations", "conversation", *STRINGS, "messages")
"""Columns that hold a prompt, most telling first; `messages` is last: beside a prompt it is a whole conversation."""


def read_prompt(fields: Fields, names: tuple[str, ...] = NAMES) -> str | Conversation | None:
    """The row's prompt without its system message; None where it has none."""
    name = present(fields, names)
    if name is None:
        return None
    if name in MESSAGE_LISTS or isinstance(fields[name], list | dict):
        return conversation(fields[name], name)
    return instruction(fields) if name == "instruction" else text_field(fields, name)


def head_of(fields: Fields, prompt: str | Conversation | None) -> Conversation:
    """The prompt as turns, with the row's system message and earlier turns."""
    if isinstance(prompt, str):
        prompt = prompt_turns(prompt) or (*history(fields), Message("user", prompt))
    return with_system(system_text(fields), prompt or ())


def is_plain(fields: Fields, prompt: str | Conversation | None) -> bool:
    """Whether the prompt is one string that stands for one user turn."""
    return isinstance(prompt, str) and not history(fields) and prompt_turns(prompt) is None


def whole(head: Conversation, side: str | Conversation, name: str) -> Conversation:
    """The answer as a whole conversation, prompt first; its own turns may repeat the prompt."""
    if not head and (isinstance(side, str) or side[0].role == "assistant"):
        what = "is a string" if isinstance(side, str) else "begins with the assistant's turn"
        raise BadField("prompt", "no such key", f"a prompt, since `{name}` {what}")
    if isinstance(side, str):
        return (*head, Message("assistant", side))
    if side[0].role == "assistant":
        return (*head, *side)
    if head and head[0].role == "system" and side[0].role != "system":
        side = (head[0], *side)
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
