"""Messages: from the objects of a file to turns with known roles, in a possible order.

In: JSON values, {role, content} or {from, value} objects. Out: `Message`s. Raises BadField.
Must not know: which format the row is in, tokenizers, templates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tunesmith.data.formats.calls import message_calls, optional_text_at, turn_calls
from tunesmith.data.formats.fields import BadField, Fields, found_at, shown
from tunesmith.data.types import Conversation, Json, Message, ToolCall

# Spellings are compared in lower case, with `_` for `-` and spaces.
ROLES = {
    "system": "system",
    "developer": "system",
    "system_prompt": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "gpt_3.5": "assistant",
    "gpt_4": "assistant",
    "gpt4": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "claude": "assistant",
    "gemini": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "ai": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_result": "tool",
    "tool_response": "tool",
    "tool_result": "tool",
    "ipython": "tool",
}
CALL_ROLES = frozenset({"function_call", "function_calls", "tool_call", "tool_calls"})
REASONING = ("reasoning_content", "reasoning", "thinking")
WEIGHTS = ("weight", "loss_weight", "train", "training")
HEAVIEST = 100
"""A turn that counts more than a hundred times another is a mistake: a count, or a percentage."""
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
# Which role may follow which; None is the start, `call` an assistant's turn with calls.
# Templates differ in what they refuse: this is the common ground.
FOLLOWS: dict[str | None, tuple[str, ...]] = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user",),
    "call": ("tool",),
    "tool": ("assistant", "tool"),
}


def conversation(value: Json, field: str) -> Conversation:
    """The turns of a list of messages, or of one message.

    A `function_call` turn right after an assistant's turn belongs to it: they become one message.
    """
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not value:
        raise BadField(field, shown(value), "a list of messages, [{role, content}, ...]")
    turns: list[Message] = []
    for index, item in enumerate(value):
        place = f"{field}[{index}]"
        turn, is_call = _turn(item, place)
        if is_call and turns and turns[-1].role == "assistant":
            turn = _joined(turns.pop(), turn, place)
        turns.append(turn)
    return tuple(turns)


def answer_turns(value: Json, field: str) -> Conversation:
    """An answer: a string, which is one assistant's turn, or messages."""
    return (Message("assistant", value),) if isinstance(value, str) else conversation(value, field)


def with_system(system: str, messages: Conversation) -> Conversation:
    """The messages with a system message first; where they begin with this very one, as they are."""
    head = Message("system", system)
    return messages if not system or messages[:1] == (head,) else (head, *messages)


def ordered(messages: Conversation, field: str) -> Conversation:
    """The messages, every tool's answer with the name of the tool and the id of the call that it answers.

    Raises BadField where a role follows one that it cannot follow, or a tool answers what nobody asked.
    """
    state: str | None = None
    turns: list[Message] = []
    waiting: list[ToolCall] = []
    for index, turn in enumerate(messages):
        place = f"{field}[{index}]"
        if turn.role not in FOLLOWS[state]:
            raise _misplaced(turn, state, place)
        if turn.role == "tool":
            turn = _answering(turn, waiting, place)
        elif turn.calls:
            waiting = list(turn.calls)
        turns.append(turn)
        state = "call" if turn.calls else turn.role
    return tuple(turns)


def _turn(value: Json, field: str) -> tuple[Message, bool]:
    """One message, and whether it is a ShareGPT `function_call` turn."""
    if not isinstance(value, dict):
        raise BadField(field, shown(value), "an object with role and content")
    role_key, content_key = ("from", "value") if value.get("from") is not None else ("role", "content")
    spelled = value.get(role_key)
    if not isinstance(spelled, str):
        raise BadField(f"{field}.{role_key}", found_at(value, role_key), "a role")
    content = value.get(content_key)
    if len(value) == 2 and isinstance(content, str) and ROLES.get(spelled, "tool") != "tool":
        return Message(ROLES[spelled], content), False  # the common case, on which the speed of big files hangs
    known = spelled.strip().lower().replace("-", "_").replace(" ", "_")
    media = next((key for key in MEDIA if value.get(key)), None)
    if media:
        raise BadField(f"{field}.{media}", shown(value[media]), "text only (images, videos and audio are not read yet)")
    if known in CALL_ROLES:
        if content_key not in value:
            raise BadField(f"{field}.{content_key}", "no such key", "a call")
        calls = turn_calls(content, f"{field}.{content_key}")
        return Message("assistant", "", calls=calls, weight=_weight(value, "assistant", field)), True
    if known not in ROLES:
        raise BadField(f"{field}.{role_key}", shown(spelled), "system, user, assistant or tool")
    return _message(value, ROLES[known], content_key, field), False


def _message(value: dict[str, Json], role: str, content_key: str, field: str) -> Message:
    calls = message_calls(value, field)
    reasoning = _reasoning(value, field)
    if role != "assistant" and (calls or reasoning):
        raise BadField(field, f"{'calls' if calls else 'reasoning'} of {role}", "calls and reasoning of assistant only")
    is_tool = role == "tool"
    return Message(
        role=role,
        content="" if calls and value.get(content_key) in (None, []) else _content(value, content_key, field),
        reasoning=reasoning,
        calls=calls,
        name=optional_text_at(value, "name", field) if is_tool else "",
        call_id=optional_text_at(value, "tool_call_id", field) if is_tool else "",
        weight=_weight(value, role, field),
    )


def _content(value: dict[str, Json], key: str, field: str) -> str:
    content = value.get(key)
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise BadField(f"{field}.{key}", found_at(value, key), "a string")
    return "".join(_part(part, f"{field}.{key}[{index}]") for index, part in enumerate(content))


def _part(part: Json, field: str) -> str:
    """The text of a content part, {"type": "text", "text": ...} (`value` in some files)."""
    if not isinstance(part, dict) or part.get("type") != "text":
        raise BadField(field, shown(part), 'a text part, {"type": "text", "text": ...}')
    key = "text" if part.get("text") is not None else "value"
    text = part.get(key)
    if not isinstance(text, str):
        raise BadField(f"{field}.{'text' if key not in part else key}", found_at(part, key), "a string")
    return text


def _reasoning(value: Mapping[str, Json], field: str) -> str:
    found = {key: optional_text_at(value, key, field) for key in REASONING if value.get(key) is not None}
    texts = {text for text in found.values() if text}
    if len(texts) > 1:
        raise BadField(field, f"different texts in {' and '.join(found)}", "one reasoning text")
    return next(iter(texts), "")


def _weight(value: Fields, role: str, field: str) -> float | None:
    """The file's loss weight of a turn, from 0 on, or None where it gives none."""
    given = [(key, value[key]) for key in WEIGHTS if value.get(key) is not None]
    for key, found in given:
        if not isinstance(found, int | float) or not 0 <= found <= HEAVIEST:
            raise BadField(f"{field}.{key}", shown(found), f"a number from 0 to {HEAVIEST}")
        if found != given[0][1]:
            raise BadField(f"{field}.{key}", shown(found), f"the same as `{given[0][0]}`")
        if found and role != "assistant":
            raise BadField(f"{field}.{key}", shown(found), f"0 for {role}: only assistant turns are trained")
    number = given[0][1] if given else None
    return float(number) if isinstance(number, int | float) else None


def _joined(text: Message, call: Message, field: str) -> Message:
    """An assistant's turn with the calls of the `function_call` turn after it."""
    weights = {weight for weight in (text.weight, call.weight) if weight is not None}
    if len(weights) > 1:
        raise BadField(field, "another weight than the turn before", "one weight for a turn and its calls")
    return replace(text, calls=(*text.calls, *call.calls), weight=next(iter(weights), None))


def _misplaced(turn: Message, state: str | None, place: str) -> BadField:
    if turn.role == "tool":
        after = f"after {state}" if state else "first"
        return BadField(place, f"role tool {after}, without a call", "the assistant's call before its result")
    after = {None: "first", "call": "after a call"}.get(state, f"after {state}")
    return BadField(place, f"role {turn.role} {after}", " or ".join(FOLLOWS[state]))


def _answering(result: Message, waiting: list[ToolCall], place: str) -> Message:
    """The result with its call's name and id. Found by id, else by name, else in the order of the calls."""
    if result.call_id:
        call = next((call for call in waiting if call.id == result.call_id), None)
        if call is None:
            raise BadField(
                f"{place}.tool_call_id", shown(result.call_id), "the id of a call before it, not yet answered"
            )
    else:
        if not waiting:
            raise BadField(place, "one tool result more than there are calls", "one result a call")
        call = next((call for call in waiting if call.name == result.name), waiting[0])
    waiting.remove(call)
    return replace(result, name=result.name or call.name, call_id=result.call_id or call.id)
