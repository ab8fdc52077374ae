"""OpenAI messages (ChatML): {"messages": [{"role": ..., "content": ...}, ...]}.

In: a row. Out: an example whose every assistant turn is an answer turn. Must not know: templates, tokenizers.
"""

from __future__ import annotations

from tunesmith.data.formats.fields import BadField, conversation, turns_example
from tunesmith.data.types import Example, Row


def to_example(row: Row, *, chat: bool) -> Example:
    """The prompt ends at the first assistant turn; the rest is the answer."""
    if not chat:
        raise BadField("render", "text", "chat: a list of messages has no text form without a template")
    if "messages" not in row.fields:
        raise BadField("messages", "no such key", "a list of messages")
    return turns_example(row, conversation(row.fields["messages"], "messages"), "messages")
