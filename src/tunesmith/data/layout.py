"""An example as text: the prompt that inference renders, and each answer in trained and untrained parts.

In: an example, the template, the shape of its turns. Out: layouts, in which joining the parts gives the
rendered conversation up to the last turn's end; or RowError where the template cannot be followed.
Must not know: token ids, masks over tokens, files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from tunesmith.data.template import TurnShape
from tunesmith.data.types import Conversation, Message, RowError

Render = Callable[[Conversation, bool], str]
"""Text of a conversation, with the generation prompt or without."""


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of an answer: an assistant's turn with its end (trained), or what stands between two (not)."""

    text: str
    trained: bool


@dataclass(frozen=True, slots=True)
class Layout:
    """The text of one tree: a prompt, and the parts of each branch; `raw`: no template had a hand in it."""

    prompt: str
    branches: tuple[tuple[Part, ...], ...]
    raw: bool = False


@dataclass(frozen=True, slots=True)
class _Turn:
    """An assistant turn: the text that inference would have before it, and the text up to its end."""

    before: str
    after: str


def chat_layouts(
    render: Render, shape: TurnShape, prompt: Conversation, answers: tuple[Conversation, ...]
) -> list[Layout]:
    """One layout; or, for one answer of several turns under a template that rewrites earlier turns, one a turn.

    Such a template (reasoning stripped from history, another token at the last turn's end) shows at
    inference a turn otherwise than it was generated: so each turn is trained after the history that
    inference would render (TRAPS 23). Pairs cannot be split that way: RowError.
    """
    turns = [_turns(render, shape, prompt, answer) for answer in answers]
    head = turns[0][0].before
    if all(_chained(row) for row in turns):
        return [Layout(head, tuple(_parts(row) for row in turns))]
    if len(turns) > 1:
        raise RowError("the template rewrites earlier turns: a pair that goes on for several turns cannot be trained")
    return [Layout(turn.before, ((Part(turn.after[len(turn.before) :], True),),)) for turn in turns[0]]


def _check_kept(messages: Conversation, text: str) -> None:
    """Raises RowError where the template left out what a user or the system said."""
    for message in messages:
        if message.role in ("system", "user") and message.content.strip() not in text:
            raise RowError(f"the chat template drops or changes the {message.role} message", fatal=True)


def _turns(render: Render, shape: TurnShape, prompt: Conversation, answer: Conversation) -> list[_Turn]:
    messages = (*prompt, *answer)
    places = [index for index in range(len(prompt), len(messages)) if messages[index].role == "assistant"]
    turns = [_turn(render, shape, messages[:index], messages[index]) for index in places]
    _check_kept(messages, turns[-1].after)
    return turns


def _turn(render: Render, shape: TurnShape, history: Conversation, answer: Message) -> _Turn:
    before = render(history, True)
    full = render((*history, answer), False)
    if not full.endswith(shape.tail):
        raise RowError(f"the template ends this answer by {full[-20:]!r} and others by {shape.tail!r}", fatal=True)
    full = full.removesuffix(shape.tail)
    content = answer.content
    for form in (content, content.rstrip(), content.lstrip(), content.strip()):
        inner = _written(before, full, form, shape.lead)
        if inner is not None:
            return _Turn(before, before + inner + shape.ending)
    raise RowError(f"the template changes the answer: {_short(content)} became {_short(full)}", fatal=True)


def _written(before: str, full: str, form: str, lead: str) -> str | None:
    """What stands after the prompt in this turn if the answer was written in this form; None if it was not.

    The prompt may hold the answer's first characters (`<think>`), or the template may show another prompt
    once the answer is there (Mistral moves the system message): what inference renders counts.
    """
    if not full.endswith(form):
        return None
    if not full.startswith(before):
        return lead + form if full.endswith(lead + form) else None
    inner = full[len(before) :]
    return inner if inner in (form, lead + form) or len(inner) < len(form) else None


def _chained(turns: list[_Turn]) -> bool:
    """Whether every turn, as it was generated, is the head of what inference renders at the next."""
    return all(later.before.startswith(turn.after) for turn, later in pairwise(turns))


def _parts(turns: list[_Turn]) -> tuple[Part, ...]:
    parts = []
    place = len(turns[0].before)
    for turn in turns:
        if len(turn.before) > place:
            parts.append(Part(turn.before[place:], False))
        parts.append(Part(turn.after[len(turn.before) :], True))
        place = len(turn.after)
    return tuple(parts)


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:30]}...{text[-27:]}")
