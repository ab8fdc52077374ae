"""ToolAlpaca (Tang et al. 2023), one instance a row: {"input": ..., "intermediate_steps": [...], "output": ...}.

In: a row; a step is [[action, action input as JSON, what the assistant wrote], observation]. Out: turns.
Differs: the released file nests the instances in one object an API; they are to be written one a row first.
Must not know: templates, tokenizers.
"""

from __future__ import annotations

from tunesmith.data.formats.calls import one_call
from tunesmith.data.formats.fields import BadField, Fields, shown, text_field
from tunesmith.data.types import Conversation, Json, Message

KEYS = ("input", "intermediate_steps", "output")
ACTION = "Action:"


def turns(fields: Fields) -> Conversation:
    """The question, a call and its result for each step, and the final answer."""
    steps = fields["intermediate_steps"]
    if not isinstance(steps, list):
        raise BadField("intermediate_steps", shown(steps), "a list of steps")
    middle = [turn for index, step in enumerate(steps) for turn in _step(step, f"intermediate_steps[{index}]")]
    question, answer = text_field(fields, "input"), text_field(fields, "output")
    return (Message("user", question), *middle, Message("assistant", answer))


def _step(value: Json, field: str) -> Conversation:
    match value:
        case [[str(name), str() | dict() as arguments, *rest], str(observation)]:
            call = one_call({"name": name, "arguments": arguments}, field)
            written = rest[0] if rest and isinstance(rest[0], str) else ""
            thought = written.partition(ACTION)[0].strip() if ACTION in written else ""
            return Message("assistant", thought, calls=(call,)), Message("tool", observation)
    raise BadField(field, shown(value), "[[action, action input, text], observation]")
