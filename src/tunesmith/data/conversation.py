"""Messages in the form that chat templates read, and whether what they say is in a text.

In: messages, the text of a list of tools. Out: dicts for a template; what of a call or a tool is missing in a text.
Must not know: templates themselves, tokens, files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from tunesmith.data.types import Conversation, Json, Message, RowError, ToolCall

Dicts = list[dict[str, Json]]
Mark = Callable[[str], str]


@dataclass(frozen=True, slots=True)
class CallForm:
    """How a template wants tool calls; which one it is, is found by probing (`data/calls.py`).

    `arguments`: an object, or the text of one. `ids`: the file's own, or of nine characters (Mistral refuses
    others). `empty`: whether the content of a turn of nothing but calls is "" or no key at all.
    """

    arguments: Literal["object", "text"] = "object"
    ids: Literal["own", "nine"] = "own"
    empty: Literal["text", "absent"] = "text"


CALL_FORMS = (
    CallForm(),
    CallForm("text"),
    CallForm(empty="absent"),
    CallForm("text", empty="absent"),
    CallForm(ids="nine"),
    CallForm("text", "nine"),
    CallForm(ids="nine", empty="absent"),
    CallForm("text", "nine", "absent"),
)


def to_dicts(messages: Conversation, form: CallForm) -> Dicts:
    """The messages as a template reads them; calls without an id get one, and their results the same."""
    dicts: Dicts = []
    open_calls: list[tuple[str, str, str]] = []  # (id in the file, id given, function) of calls without a result
    num_calls = 0
    for message in messages:
        found: dict[str, Json] = {"role": message.role, "content": message.content}
        if message.reasoning:
            found["reasoning_content"] = message.reasoning
        if message.calls:
            ids = [_call_id(call, num_calls + index, form) for index, call in enumerate(message.calls)]
            num_calls += len(ids)
            open_calls += [(call.id, given, call.name) for call, given in zip(message.calls, ids, strict=True)]
            found["tool_calls"] = [
                _call_dict(call, given, form) for call, given in zip(message.calls, ids, strict=True)
            ]
            if form.empty == "absent" and not message.content:
                del found["content"]
        if message.role == "tool":
            place = next((i for i, call in enumerate(open_calls) if message.call_id and call[0] == message.call_id), 0)
            _, given, function = open_calls.pop(place) if open_calls else ("", message.call_id, "")
            if given:
                found["tool_call_id"] = given
            if message.name or function:
                found["name"] = message.name or function
        dicts.append(found)
    return dicts


def _call_id(call: ToolCall, number: int, form: CallForm) -> str:
    return call.id if call.id and form.ids == "own" else f"call{number:05}"


def _call_dict(call: ToolCall, given: str, form: CallForm) -> dict[str, Json]:
    arguments: Json = arguments_of(call) if form.arguments == "object" else call.arguments
    return {"type": "function", "id": given, "function": {"name": call.name, "arguments": arguments}}


@lru_cache(maxsize=1024)
def _parsed(text: str) -> Json:
    found: Json = json.loads(text)
    return found


def arguments_of(call: ToolCall) -> dict[str, Json]:
    """A call's arguments. Raises RowError where they are not a JSON object."""
    try:
        found = _parsed(call.arguments)
    except ValueError as error:
        raise RowError(f"the arguments of a tool call are not JSON: {error}", fatal=True) from error
    if not isinstance(found, dict):
        raise RowError("the arguments of a tool call are not a JSON object", fatal=True)
    return found


def tool_list(tools: str) -> Dicts | None:
    """The tools as templates expect them, {type: function, function: {...}}; None for none."""
    if not tools:
        return None
    try:
        found = _parsed(tools)
    except ValueError as error:
        raise RowError(f"`tools` is not JSON: {error}", fatal=True) from error
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        raise RowError("`tools` is not a JSON list of objects", fatal=True)
    dicts = [tool for tool in found if isinstance(tool, dict)]
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in dicts] or None


# --- control tokens spelled in them


def marked_message(message: Message, mark: Mark) -> Message:
    """The message with every string in it marked; arguments of calls are marked inside their JSON."""
    calls = tuple(
        ToolCall(mark(call.name), marked_json(arguments_of(call), mark), mark(call.id)) for call in message.calls
    )
    return replace(
        message,
        content=mark(message.content),
        reasoning=mark(message.reasoning),
        calls=calls,
        name=mark(message.name),
        call_id=mark(message.call_id),
    )


def marked_json(value: Json, mark: Mark) -> str:
    """The text of a value with every string in it marked."""
    return json.dumps(_map_strings(value, mark), ensure_ascii=False)


def _map_strings(value: Json, change: Mark) -> Json:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_map_strings(item, change) for item in value]
    if isinstance(value, dict):
        return {change(key): _map_strings(item, change) for key, item in value.items()}
    return value


# --- what a text holds of them


def missing_of_call(call: ToolCall, text: str) -> str:
    """What of a call is not in the text, in words; "" where all of it is."""
    if not holds(text, call.name):
        return f"the name of the call, {call.name!r}"
    for key, value in arguments_of(call).items():
        if not holds(text, key):
            return f"the argument {key!r} of {call.name}"
        if not all(holds(text, leaf) for leaf in _leaves(value)):
            return f"the value of {key!r} of {call.name}"
    return ""


def missing_tool(tools: Dicts, text: str) -> str:
    """The name of a tool that is not in the text; "" where all are."""
    for tool in tools:
        function = tool.get("function")
        name = function.get("name") if isinstance(function, dict) else None
        if isinstance(name, str) and not holds(text, name):
            return name
    return ""


def holds_result(text: str, content: str) -> bool:
    """Whether the text holds a tool's result, as it stands or rewritten from JSON."""
    if holds(text, content):
        return True
    try:
        value = _parsed(content)
    except ValueError:
        return False
    return all(holds(text, leaf) for leaf in _leaves(value))


def holds(text: str, value: Json) -> bool:
    """Whether the text holds a string or number, as it stands or as JSON or Python writes it."""
    if isinstance(value, str):
        return value.strip() in text or json.dumps(value.strip(), ensure_ascii=False)[1:-1] in text
    return json.dumps(value) in text or str(value) in text


def _leaves(value: Json) -> Iterator[Json]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    else:
        yield value
