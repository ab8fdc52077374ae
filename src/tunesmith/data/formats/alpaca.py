"""Alpaca (Taori et al. 2023): {"instruction": ..., "input": ..., "output": ...}, with an optional `system`.

In: a row. Out: an example of one user turn and one answer. Must not know: templates, tokenizers.
"""

from __future__ import annotations

from tunesmith.data.formats.fields import Fields, optional_text, string_example, text_field
from tunesmith.data.types import Example, Row


def to_example(row: Row, *, chat: bool) -> Example:
    """The instruction, a blank line and the input, where there is one, are the prompt."""
    system = optional_text(row.fields, "system")
    return string_example(row, instruction(row.fields), (text_field(row.fields, "output"),), chat=chat, system=system)


def instruction(fields: Fields) -> str:
    """The instruction with its input, as one prompt."""
    extra = optional_text(fields, "input")
    text = text_field(fields, "instruction")
    return f"{text}\n\n{extra}" if extra.strip() else text
