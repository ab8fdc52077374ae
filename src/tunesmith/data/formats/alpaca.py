"""Alpaca (Taori et al. 2023): {"instruction": ..., "input": ..., "output": ...}, with optional `system`, `history`.

In: a row; `context` stands for `input` and `response` for `output` in some files (Dolly). Out: an example of the
earlier turns, one user turn and one answer. Must not know: templates, tokenizers.
"""

from __future__ import annotations

from tunesmith.data.formats.examples import string_example, turns_example
from tunesmith.data.formats.fields import (
    BadField,
    Fields,
    fitting,
    optional_text,
    present,
    shown,
    system_text,
    text_field,
)
from tunesmith.data.formats.turns import with_system
from tunesmith.data.types import Conversation, Example, Json, Message, Row

SPELLINGS = tuple(("instruction", answer) for answer in ("output", "response", "completion", "answer"))
INPUTS = ("input", "context")


def to_example(row: Row, *, chat: bool) -> Example:
    """The instruction, a blank line and the input, where there is one, are the prompt."""
    fields = row.fields
    system, earlier = system_text(fields), history(fields)
    question, answer = instruction(fields), text_field(fields, fitting(fields, SPELLINGS)[1])
    if not chat or not earlier:
        return string_example(row, question, (answer,), chat=chat, system=system, history=earlier)
    talk = (*earlier, Message("user", question), Message("assistant", answer))
    return turns_example(row, with_system(system, talk), "history")


def instruction(fields: Fields) -> str:
    """The instruction with its input, as one prompt."""
    return with_more(text_field(fields, "instruction"), fields, present(fields, INPUTS))


def with_more(text: str, fields: Fields, name: str | None) -> str:
    """The text and, after a blank line, that of a column, where it holds any."""
    more = optional_text(fields, name) if name else ""
    return f"{text}\n\n{more}" if more.strip() else text


def history(fields: Fields) -> Conversation:
    """The earlier turns: `history` is a list of [question, answer]."""
    value = fields.get("history") or []
    if not isinstance(value, list):
        raise BadField("history", shown(value), "a list of [question, answer]")
    return tuple(turn for index, pair in enumerate(value) for turn in _earlier(pair, f"history[{index}]"))


def _earlier(value: Json, field: str) -> Conversation:
    match value:
        case [str(question), str(answer)]:
            return Message("user", question), Message("assistant", answer)
    raise BadField(field, shown(value), "[question, answer], two strings")
