"""Question and answer: {"question": ..., "answer": ...}, in the spellings that are in use.

In: a row, with an optional `system` (`system_prompt` in OpenOrca) and `context`, which follows the question after a
blank line. Out: an example of one user turn and one answer. Must not know: templates, tokenizers.
"""

from __future__ import annotations

from tunesmith.data.formats.alpaca import with_more
from tunesmith.data.formats.examples import string_example
from tunesmith.data.formats.fields import fitting, system_text, text_field
from tunesmith.data.types import Example, Row

SPELLINGS = (
    ("question", "answer"),
    ("question", "response"),
    ("prompt", "answer"),
    ("prompt", "response"),
    ("query", "response"),
    ("query", "answer"),
    ("problem", "solution"),
    ("question", "solution"),
    ("question", "output"),
    ("prompt", "output"),
    ("input", "output"),
)


def to_example(row: Row, *, chat: bool) -> Example:
    """One question, one answer."""
    question, answer = fitting(row.fields, SPELLINGS)
    prompt = with_more(text_field(row.fields, question), row.fields, "context")
    return string_example(row, prompt, (text_field(row.fields, answer),), chat=chat, system=system_text(row.fields))
