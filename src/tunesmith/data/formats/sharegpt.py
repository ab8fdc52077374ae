"""ShareGPT: {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", ...}]}; optional `system`, `tools`.

In: a row; calls are turns of their own (`function_call`, whose value is JSON) and so are their results
(`observation`), as in glaive's data. Out: an example whose every assistant turn is an answer turn.
Must not know: templates, tokenizers.
"""

from __future__ import annotations

from tunesmith.data.formats.examples import check_text_render, turns_example
from tunesmith.data.formats.fields import BadField, Fields, present, system_text
from tunesmith.data.formats.turns import conversation, with_system
from tunesmith.data.types import Conversation, Example, Row

NAMES = ("conversations", "conversation")


def to_example(row: Row, *, chat: bool) -> Example:
    """Every known spelling of the roles is read (`turns.ROLES`)."""
    check_text_render(row.fields, chat=chat)
    return turns_example(row, turns(row.fields), present(row.fields, NAMES) or NAMES[0])


def turns(fields: Fields) -> Conversation:
    """The row's turns, with the system message of its own column first."""
    name = present(fields, NAMES)
    if name is None:
        found = "null" if NAMES[0] in fields else "no such key"
        raise BadField(NAMES[0], found, "a list of turns, [{from, value}, ...]")
    return with_system(system_text(fields), conversation(fields[name], name))
