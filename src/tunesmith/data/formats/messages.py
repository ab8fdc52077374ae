"""OpenAI messages (ChatML): {"messages": [{"role": ..., "content": ...}, ...]}, with optional `tools` and `system`.

In: a row, or an instance of ToolAlpaca. Out: an example whose every assistant turn is an answer turn.
Must not know: templates, tokenizers.
"""

from __future__ import annotations

from tunesmith.data.formats import toolalpaca
from tunesmith.data.formats.examples import check_text_render, turns_example
from tunesmith.data.formats.fields import BadField, Fields, system_text
from tunesmith.data.formats.turns import conversation, with_system
from tunesmith.data.types import Conversation, Example, Row


def to_example(row: Row, *, chat: bool) -> Example:
    """The prompt ends at the first assistant turn; the rest is the answer."""
    check_text_render(row.fields, chat=chat)
    return turns_example(row, turns(row.fields), "messages")


def turns(fields: Fields) -> Conversation:
    """The row's messages, with the system message of its own column first."""
    if fields.get("messages") is None and fields.get("intermediate_steps") is not None:
        return toolalpaca.turns(fields)
    if "messages" not in fields:
        raise BadField("messages", "no such key", "a list of messages")
    return with_system(system_text(fields), conversation(fields["messages"], "messages"))
