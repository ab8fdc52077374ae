"""Plain text: {"text": ...}.

In: a row. Out: an example with an empty prompt, so that every token is trained. Must not know: templates, tokenizers.
"""

from __future__ import annotations

from tunesmith.data.formats.examples import string_example
from tunesmith.data.formats.fields import BadField, Degenerate, text_field
from tunesmith.data.types import Example, Row


def to_example(row: Row, *, chat: bool) -> Example:
    """The whole text is one answer to nothing."""
    if chat:
        raise BadField("render", "chat", "text: plain text has no turns")
    text = text_field(row.fields, "text")
    if not text.strip():
        raise Degenerate("empty text")
    return string_example(row, "", (text,), chat=False)
