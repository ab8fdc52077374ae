"""Conversations and strings to examples: where the prompt ends, and what teaches nothing.

In: a row, its turns or texts. Out: an example. Raises BadField, and Degenerate with a ledger reason.
Must not know: which format the row is in, tokenizers, templates.
"""

from __future__ import annotations

from tunesmith.data.formats.calls import tools_text
from tunesmith.data.formats.fields import BadField, Degenerate, Fields, optional_text, shown, text_field
from tunesmith.data.formats.turns import ordered
from tunesmith.data.types import Conversation, Example, Message, Row

EQUAL_PAIR = "chosen equals rejected"
EQUAL_ANSWERS = "all answers are equal"


def turns_example(row: Row, messages: Conversation, field: str, *, last_only: bool = False) -> Example:
    """A conversation: the prompt ends at the first assistant turn, or with `last_only` at the last."""
    messages = ordered(messages, field)
    _check_end(messages, field)
    places = [index for index, current in enumerate(messages) if current.role == "assistant"]
    split = places[-1 if last_only else 0]
    return chat_example(row, messages[:split], (messages[split:],))


def chat_example(row: Row, prompt: Conversation, answers: tuple[Conversation, ...], *, tools: str = "") -> Example:
    """Ordered messages to an example. Raises Degenerate where a side is empty or all answers are equal."""
    if not any(current.content.strip() for current in prompt if current.role != "system"):
        raise Degenerate("empty prompt")
    if any(_says_nothing(turn) for answer in answers for turn in answer if turn.role == "assistant"):
        raise Degenerate("empty answer")
    if len(answers) > 1 and all(said(answer) == said(answers[0]) for answer in answers):
        raise Degenerate(EQUAL_PAIR if len(answers) == 2 else EQUAL_ANSWERS)
    return _example(row, prompt, answers, tools=tools or tools_text(row.fields))


def string_example(
    row: Row, prompt: str, answers: tuple[str, ...], *, chat: bool, system: str = "", history: Conversation = ()
) -> Example:
    """A string prompt and its answers: one user and one assistant turn each, or text as it stands."""
    if chat:
        head = (Message("system", system),) if system else ()
        turns = tuple((Message("assistant", answer),) for answer in answers)
        return chat_example(row, (*head, *history, Message("user", prompt)), turns)
    if history:
        raise BadField("history", "earlier turns", "none, since the recipe says `render: text`")
    if tools := tools_text(row.fields):
        raise BadField("tools", shown(tools), "none, or `render: chat`: raw text offers no tools")
    if any(not answer.strip() for answer in answers):
        raise Degenerate("empty answer")
    if len(answers) > 1 and len(set(answers)) == 1:
        raise Degenerate(EQUAL_PAIR if len(answers) == 2 else EQUAL_ANSWERS)
    return _example(row, f"{system}\n\n{prompt}" if system else prompt, answers)


def pair_example(
    row: Row,
    chosen: Conversation,
    rejected: Conversation,
    *,
    names: tuple[str, str] = ("chosen", "rejected"),
    tools: str = "",
) -> Example:
    """Two whole conversations: the prompt is their shared head, up to the last assistant turn that both have there."""
    sides = ordered(chosen, names[0]), ordered(rejected, names[1])
    for name, side in zip(names, sides, strict=True):
        _check_end(side, name)
    chosen, rejected = sides
    heads = said(chosen), said(rejected)
    shared = 0
    while shared < min(len(chosen), len(rejected)) and heads[0][shared] == heads[1][shared]:
        shared += 1
    split = min(shared, len(chosen) - 1, len(rejected) - 1)
    while split > 0 and not chosen[split].role == rejected[split].role == "assistant":
        split -= 1
    if split == 0:
        raise BadField(names[1], "a conversation that begins differently", f"the same prompt as `{names[0]}`")
    return chat_example(row, chosen[:split], (chosen[split:], rejected[split:]), tools=tools)


def said(messages: Conversation) -> list[tuple[str, ...]]:
    """What the turns say, by which two are the same: ids of calls and weights apart."""
    return [
        (turn.role, turn.content, turn.reasoning, str([(call.name, call.arguments) for call in turn.calls]))
        for turn in messages
    ]


def check_text_render(fields: Fields, *, chat: bool) -> None:
    """Raises BadField where the recipe wants text of a format that has only messages."""
    if not chat:
        raise BadField("render", "text", "chat: a list of messages has no text form without a template")


def _says_nothing(turn: Message) -> bool:
    return not turn.content.strip() and not turn.calls


def _check_end(messages: Conversation, field: str) -> None:
    last = messages[-1].role
    if last != "assistant":
        found = f"the last message is from {last}, so nothing would be trained on it"
        raise BadField(field, found, "a last message from assistant")


def _example(
    row: Row, prompt: Conversation | str, answers: tuple[Conversation, ...] | tuple[str, ...], *, tools: str = ""
) -> Example:
    fields = row.fields
    accepted = fields.get("accepted") or []
    if not isinstance(accepted, list) or not all(isinstance(item, str) for item in accepted):
        raise BadField("accepted", shown(accepted), "a list of strings")
    tags = fields.get("tags")
    # A list of labels is common and means nothing here; an object of strings groups the comparison.
    if not isinstance(tags, dict):
        tags = {}
    if not all(isinstance(item, str) for item in tags.values()):
        raise BadField("tags", shown(tags), "an object of strings")
    kind = {"kind": text_field(fields, "kind")} if isinstance(fields.get("kind"), str) else {}
    return Example(
        id=row.id,
        sha=row.sha,
        prompt=prompt,
        answers=answers,
        value=optional_text(fields, "value") or None,
        accepted=tuple(str(item) for item in accepted),
        tags={**kind, **{key: str(item) for key, item in tags.items()}},
        tools=tools,
    )
