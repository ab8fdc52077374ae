"""What every format shares: typed reading of fields, conversations, and the split into prompt and answers.

In: a row's fields. Out: strings, messages and examples; BadField where a field is malformed (the run
stops), Degenerate where the row is well formed but teaches nothing (it is dropped and counted).
Must not know: files, tokenizers, templates.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from tunesmith.data.types import Conversation, Example, Json, Message, Row

Fields = Mapping[str, Json]

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "claude": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "ai": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
}
TOOL_CALL_ROLES = {"function_call", "tool_call"}
# Which role may follow which; None is the start. Templates differ in what they refuse: this is the common ground.
FOLLOWS: dict[str | None, set[str]] = {
    None: {"system", "user"},
    "system": {"user"},
    "user": {"assistant"},
    "assistant": {"user", "tool"},
    "tool": {"assistant", "tool"},
}
UNSUPPORTED_MESSAGE_KEYS = ("tool_calls", "function_call", "reasoning_content", "thinking", "images")


class BadField(Exception):
    """A malformed field: what was found and what is wanted there."""

    def __init__(self, field: str, found: str, wanted: str) -> None:
        super().__init__(f"`{field}`: found {found}; wanted {wanted}")
        self.field = field
        self.found = found
        self.wanted = wanted


class Degenerate(Exception):
    """A well-formed row that teaches nothing; the reason is a ledger reason."""


def shown(value: Json) -> str:
    """A value for an error message, cut to a readable length."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def text_field(fields: Fields, name: str) -> str:
    """A required string. Raises BadField where it is missing or not a string."""
    if name not in fields:
        raise BadField(name, "no such key", "a string")
    value = fields[name]
    if not isinstance(value, str):
        raise BadField(name, shown(value), "a string")
    return value


def optional_text(fields: Fields, name: str) -> str:
    """A string, or "" where the key is missing or null."""
    return text_field(fields, name) if fields.get(name) is not None else ""


def conversation(value: Json, field: str) -> Conversation:
    """A list of {role, content} or {from, value} messages, with known roles, in a possible order."""
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not value:
        raise BadField(field, shown(value), "a list of messages, [{role, content}, ...]")
    return tuple(message(item, f"{field}[{index}]") for index, item in enumerate(value))


def message(value: Json, field: str) -> Message:
    """One message. Raises BadField for an unknown role, a missing or non-text content, and tool calls."""
    if not isinstance(value, dict):
        raise BadField(field, shown(value), "an object with role and content")
    role_key, content_key = ("from", "value") if "from" in value else ("role", "content")
    role = value.get(role_key)
    if not isinstance(role, str):
        raise BadField(f"{field}.{role_key}", shown(role) if role_key in value else "no such key", "a role")
    for key in UNSUPPORTED_MESSAGE_KEYS:
        if value.get(key):
            raise BadField(f"{field}.{key}", shown(value[key]), "plain text turns (this key is not supported yet)")
    known = ROLES.get(role.strip().lower())
    if known is None:
        if role.strip().lower() in TOOL_CALL_ROLES:
            raise BadField(f"{field}.{role_key}", shown(role), "plain text turns (tool calls are not supported yet)")
        raise BadField(f"{field}.{role_key}", shown(role), "system, user, assistant or tool")
    _check_weight(value, known, field)
    return Message(role=known, content=_content(value, content_key, field))


def _content(value: dict[str, Json], key: str, field: str) -> str:
    if key not in value:
        raise BadField(f"{field}.{key}", "no such key", "a string")
    content = value[key]
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise BadField(f"{field}.{key}", shown(content), "a string")
    parts = [_part(part, f"{field}.{key}[{index}]") for index, part in enumerate(content)]
    return "".join(parts)


def _part(part: Json, field: str) -> str:
    """The text of a content part, {"type": "text", "text": ...} (`value` in some files)."""
    if not isinstance(part, dict) or part.get("type") != "text":
        raise BadField(field, shown(part), 'a text part, {"type": "text", "text": ...}')
    return text_field(part, "text" if "text" in part else "value")


def _check_weight(value: dict[str, Json], role: str, field: str) -> None:
    """Per-message weights are not supported yet; weights that say what happens anyway are let through."""
    default = 1 if role == "assistant" else 0
    for key in ("weight", "loss_weight"):
        found = value.get(key)
        if found is not None and found != default:
            raise BadField(f"{field}.{key}", shown(found), f"{default} for {role} (weights are not supported yet)")


def check_order(messages: Conversation, field: str) -> None:
    """Raises BadField where a role follows one that it cannot follow."""
    before: str | None = None
    for index, current in enumerate(messages):
        if current.role not in FOLLOWS[before]:
            wanted = " or ".join(sorted(FOLLOWS[before]))
            place = f"after {before}" if before else "first"
            raise BadField(f"{field}[{index}]", f"role {current.role} {place}", wanted)
        before = current.role


def turns_example(row: Row, messages: Conversation, field: str) -> Example:
    """A conversation: the prompt ends at the first assistant turn, and every assistant turn is trained."""
    check_order(messages, field)
    if messages[-1].role != "assistant":
        raise BadField(
            field,
            f"the last message is from {messages[-1].role}, so nothing would be trained on it",
            "a last message from assistant",
        )
    first = next(index for index, current in enumerate(messages) if current.role == "assistant")
    return chat_example(row, messages[:first], (messages[first:],))


def chat_example(row: Row, prompt: Conversation, answers: tuple[Conversation, ...]) -> Example:
    """Messages to an example. Raises Degenerate where a side is empty or all answers are equal."""
    if not any(current.content.strip() for current in prompt if current.role != "system"):
        raise Degenerate("empty prompt")
    if any(not turn.content.strip() for answer in answers for turn in answer if turn.role == "assistant"):
        raise Degenerate("empty answer")
    if len(answers) > 1 and len(set(answers)) == 1:
        raise Degenerate("chosen equals rejected")
    return _example(row, prompt, answers)


def string_example(row: Row, prompt: str, answers: tuple[str, ...], *, chat: bool, system: str = "") -> Example:
    """A string prompt and its answers: one user and one assistant turn each, or text as it stands."""
    if chat:
        head = (Message("system", system),) if system else ()
        turns = tuple((Message("assistant", answer),) for answer in answers)
        return chat_example(row, (*head, Message("user", prompt)), turns)
    if any(not answer.strip() for answer in answers):
        raise Degenerate("empty answer")
    if len(answers) > 1 and len(set(answers)) == 1:
        raise Degenerate("chosen equals rejected")
    return _example(row, f"{system}\n\n{prompt}" if system else prompt, answers)


def pair_example(row: Row, chosen: Conversation, rejected: Conversation) -> Example:
    """Two whole conversations: the prompt is their shared head, up to the last assistant turn that both have there."""
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        check_order(side, name)
        if side[-1].role != "assistant":
            raise BadField(name, f"the last message is from {side[-1].role}", "a last message from assistant")
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    split = min(shared, len(chosen) - 1, len(rejected) - 1)
    while split > 0 and not chosen[split].role == rejected[split].role == "assistant":
        split -= 1
    if split == 0:
        raise BadField("rejected", "a conversation that begins differently", "the same prompt as `chosen`")
    return chat_example(row, chosen[:split], (chosen[split:], rejected[split:]))


def _example(row: Row, prompt: Conversation | str, answers: tuple[Conversation, ...] | tuple[str, ...]) -> Example:
    fields = row.fields
    value = optional_text(fields, "value") if "value" in fields else None
    accepted = fields.get("accepted") or []
    if not isinstance(accepted, list) or not all(isinstance(item, str) for item in accepted):
        raise BadField("accepted", shown(accepted), "a list of strings")
    tags = fields.get("tags") or {}
    if not isinstance(tags, dict) or not all(isinstance(item, str) for item in tags.values()):
        raise BadField("tags", shown(tags), "an object of strings")
    kind = {"kind": text_field(fields, "kind")} if isinstance(fields.get("kind"), str) else {}
    return Example(
        id=row.id,
        sha=row.sha,
        prompt=prompt,
        answers=answers,
        value=value or None,
        accepted=tuple(str(item) for item in accepted),
        tags={**kind, **{key: str(item) for key, item in tags.items()}},
    )
