"""What a template makes of tools and of an assistant's calls, found by trying, never by its name.

In: a template in its sandbox, the shape of an ordinary turn. Out: the form in which it wants calls and the token
that ends a turn of them; or the reason, in words, why rows with tools or calls cannot be trained.
Must not know: rows, token masks.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from tunesmith.data.conversation import CALL_FORMS, CallForm, missing_of_call, missing_tool, to_dicts, tool_list
from tunesmith.data.sandbox import Sandbox
from tunesmith.data.types import Message, ToolCall
from tunesmith.errors import ModelError

_QUESTION = Message("user", "probe question")
_TOOL_NAME = "probe_tool_of_many"
_TOOLS = json.dumps(
    [
        {
            "type": "function",
            "function": {
                "name": _TOOL_NAME,
                "description": "Probes.",
                "parameters": {
                    "type": "object",
                    "properties": {"probe_key": {"type": "string", "description": "What to probe."}},
                    "required": ["probe_key"],
                },
            },
        }
    ]
)
_ONE = ToolCall(_TOOL_NAME, '{"probe_key": "probe value"}', "call_of_probe_1")
_OTHER = ToolCall("other_function", '{"other_key": 7}', "call_of_probe_2")
# What a template writes where it wanted the other form: Python's spelling of an object, or a text quoted twice.
_WRONG_FORMS = ("{'probe_key'", '\\"probe_key')


@dataclass(frozen=True, slots=True)
class CallShape:
    """How a template takes calls: the form, and the end of a turn of calls.

    A turn of calls ends with `stop` (the token `stop_id`), after which the template writes `after`.
    `refused` says why rows with calls cannot be trained, "" where they can; `tools_refused` the same of tools.
    """

    form: CallForm
    stop: str = ""
    stop_id: int = -1
    after: str = ""
    refused: str = ""
    tools_refused: str = ""


def probe_calls(sandbox: Sandbox, control: dict[str, int], stop_id: int) -> CallShape:
    """The shape of a turn of calls; `control` are the tokenizer's control tokens, `stop_id` ends ordinary turns."""
    tools_refused = _refusal_of_tools(sandbox)
    refused = ""
    for form in CALL_FORMS:
        try:
            one, other = _render(sandbox, form, _ONE), _render(sandbox, form, _OTHER)
        except ModelError as error:
            refused = refused or error.what
            continue
        missing = missing_of_call(_ONE, one) or missing_of_call(_OTHER, other)
        wrong = any(spelling in one for spelling in _WRONG_FORMS)
        if missing or wrong:
            refused = refused or f"the chat template drops {missing or 'the form of the arguments'}"
            continue
        shared = _shared_end(one, other)
        stop = _stop(sandbox, form, shared, control, stop_id)
        if stop is None:
            refused = f"no token of the chat template ends a turn of tool calls: it writes only {shared[-40:]!r}"
            continue
        place = shared.rfind(stop)
        return CallShape(form, stop, control[stop], shared[place + len(stop) :], "", tools_refused)
    return CallShape(CallForm(), refused=refused, tools_refused=tools_refused)


def _shared_end(one: str, other: str) -> str:
    pairs = zip(reversed(one), reversed(other), strict=False)
    length = next((count for count, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
    return one[len(one) - length :]


def _render(sandbox: Sandbox, form: CallForm, *calls: ToolCall) -> str:
    messages = (_QUESTION, Message("assistant", "", calls=calls))
    return sandbox.text(to_dicts(messages, form), tool_list(_TOOLS), add_generation_prompt=False)


def _stop(sandbox: Sandbox, form: CallForm, shared: str, control: dict[str, int], stop_id: int) -> str | None:
    """The token that ends ordinary turns, if it ends these too; else the last one, unless it ends every call."""
    usual = next((token for token, token_id in control.items() if token_id == stop_id and token in shared), None)
    if usual is not None:
        return usual
    places = [(shared.rfind(token) + len(token), len(token), token) for token in control if token in shared]
    if not places:
        return None
    token = max(places)[2]
    try:
        alone, both = _render(sandbox, form, _ONE), _render(sandbox, form, _ONE, _OTHER)
    except ModelError:
        return token  # only one call a turn
    return token if both.count(token) == alone.count(token) else None


def _refusal_of_tools(sandbox: Sandbox) -> str:
    tools = tool_list(_TOOLS)
    assert tools is not None
    try:
        text = sandbox.text(to_dicts((_QUESTION,), CallForm()), tools, add_generation_prompt=True)
    except ModelError as error:
        return error.what
    return "the chat template drops the tools" if missing_tool(tools, text) else ""
