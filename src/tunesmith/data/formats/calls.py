"""Tools, and the calls that an assistant's turn makes, in the spellings that are in use.

In: JSON values of a message or a row. Out: `ToolCall`s, and the text of the tools' JSON array in OpenAI's form.
Raises BadField. Must not know: files, tokenizers, templates.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from tunesmith.data.formats.fields import BadField, Fields, found_at, optional_text, parsed, shown, text_field
from tunesmith.data.types import Json, ToolCall

TOOLS = ("tools", "functions")
"""Columns that hold the tools which a prompt offers; `functions` is what OpenAI called them first."""
CALL = '{"name": ..., "arguments": {...}}'


def message_calls(message: Fields, field: str) -> tuple[ToolCall, ...]:
    """The calls of an OpenAI message: `tool_calls`, or the legacy `function_call`."""
    legacy, value = message.get("function_call"), message.get("tool_calls")
    if legacy and value:
        raise BadField(f"{field}.function_call", shown(legacy), "nothing beside `tool_calls`")
    if legacy:
        return (one_call(legacy, f"{field}.function_call"),)
    if not value:
        return ()
    name = f"{field}.tool_calls"
    if isinstance(value, str):
        value = parsed(value, name, "a list of calls")
    if not isinstance(value, list):
        raise BadField(name, shown(value), "a list of calls")
    return tuple(one_call(call, f"{name}[{index}]") for index, call in enumerate(value))


def turn_calls(value: Json, field: str) -> tuple[ToolCall, ...]:
    """The calls of a ShareGPT `function_call` turn: a call or a list of them, as JSON text or as it stands."""
    if isinstance(value, str):
        value = parsed(value, field, f"JSON, {CALL}")
    calls = value if isinstance(value, list) else [value]
    if not calls:
        raise BadField(field, shown(value), f"a call, {CALL}")
    return tuple(one_call(call, field) for call in calls)


def one_call(value: Json, field: str) -> ToolCall:
    """A call, bare or as OpenAI writes it: {"id": ..., "type": "function", "function": {"name", "arguments"}}."""
    if not isinstance(value, dict):
        raise BadField(field, shown(value), f"a call, {CALL}")
    if value.get("type") not in (None, "function"):
        raise BadField(f"{field}.type", shown(value["type"]), '"function"')
    function = value.get("function") if value.get("function") is not None else value
    if not isinstance(function, dict):
        raise BadField(f"{field}.function", shown(function), f"a call, {CALL}")
    name = function.get("name")
    if not isinstance(name, str) or not name.strip():
        raise BadField(f"{field}.name", found_at(function, "name"), "the name of a tool")
    call_id = value.get("id")
    if not isinstance(call_id, str | None):
        raise BadField(f"{field}.id", shown(call_id), "a string")
    return ToolCall(name=name, arguments=_arguments(function, field), id=call_id or "")


def tools_text(fields: Fields) -> str:
    """The row's tools as the text of a JSON array in OpenAI's form, keys in the file's order; "" for none."""
    for name in TOOLS:
        if found := tools_of(fields.get(name), name):
            return found
    return ""


def tools_of(value: Json, field: str) -> str:
    """A list of tools, or its JSON text, as `tools_text` gives it."""
    if isinstance(value, str) and value.strip():
        value = parsed(value, field, "a list of tools, or its JSON text")
    if not value:
        return ""
    if not isinstance(value, list):
        raise BadField(field, shown(value), "a list of tools")
    return json.dumps([_tool(tool, f"{field}[{index}]") for index, tool in enumerate(value)], ensure_ascii=False)


def _tool(value: Json, field: str) -> Json:
    if isinstance(value, str):
        value = parsed(value, field, "a tool")
    if not isinstance(value, dict):
        raise BadField(field, shown(value), 'a tool, {"type": "function", "function": {"name": ..., ...}}')
    function = value.get("function")
    if function is not None and value.get("type", "function") != "function":
        raise BadField(f"{field}.type", shown(value["type"]), '"function"')
    bare = value if function is None else function
    if not isinstance(bare, dict) or not optional_text_at(bare, "name", field):
        raise BadField(f"{field}.name", found_at(bare, "name") if isinstance(bare, dict) else shown(bare), "a name")
    return value if function is not None and "type" in value else {"type": "function", "function": bare}


def optional_text_at(fields: Mapping[str, Json], name: str, place: str) -> str:
    """`optional_text`, where the error is to name the place within the row."""
    try:
        return optional_text(fields, name)
    except BadField as error:
        raise BadField(f"{place}.{name}", error.found, error.wanted) from None


def _arguments(function: Fields, field: str) -> str:
    """The text of a JSON object. Some files spell the key `parameters`."""
    key = "parameters" if "arguments" not in function and "parameters" in function else "arguments"
    value = function.get(key)
    wanted = "a JSON object, or its text"
    if isinstance(value, str):
        value = parsed(text_field(function, key), f"{field}.{key}", wanted)
    if not isinstance(value, dict):
        raise BadField(f"{field}.{key}", found_at(function, key), wanted)
    return json.dumps(value, ensure_ascii=False)
