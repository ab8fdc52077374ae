"""Question and answer: {"question": ..., "answer": ...}; `prompt` stands for `question` in evaluation files.

In: a row, with an optional `system`. Out: an example of one user turn and one answer.
Must not know: templates, tokenizers.
"""

from __future__ import annotations

from tunesmith.data.formats.fields import optional_text, string_example, text_field
from tunesmith.data.types import Example, Row


def to_example(row: Row, *, chat: bool) -> Example:
    """One question, one answer."""
    fields = row.fields
    name = "prompt" if "prompt" in fields and "question" not in fields else "question"
    system = optional_text(fields, "system")
    return string_example(row, text_field(fields, name), (text_field(fields, "answer"),), chat=chat, system=system)
