"""An example as text: the prompt that inference renders, and each answer in trained and untrained parts.

In: an example's turns, the shapes of a template's turns. Out: layouts, in which joining the parts gives the
rendered conversation up to the last turn's end; or RowError where the template cannot be followed.
Must not know: token ids, masks over tokens, files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

from tunesmith.data.calls import CallShape
from tunesmith.data.conversation import holds, holds_result, missing_of_call, missing_tool, tool_list
from tunesmith.data.template import PROBE_ANSWER, TurnShape
from tunesmith.data.turns import Chosen
from tunesmith.data.types import Conversation, Message, RowError

Render = Callable[[Conversation, bool], str]
"""Text of a conversation with its tools, with the generation prompt or without."""
END_OF_THINKING = "</think>"


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of an answer: an assistant's turn with its end, or what stands between two (never trained).

    `weight`: how much each of its tokens counts; 0: not trained.
    """

    text: str
    weight: float

    @property
    def trained(self) -> bool:
        """Whether a loss reads it."""
        return self.weight > 0


@dataclass(frozen=True, slots=True)
class Layout:
    """The text of one tree: a prompt, and the parts of each branch.

    `raw`: no template had a hand in it. `whole`: the prompt is trained too.
    """

    prompt: str
    branches: tuple[tuple[Part, ...], ...]
    raw: bool = False
    whole: bool = False


@dataclass(frozen=True, slots=True)
class Scribe:
    """What writes turns: a way to render, the shapes of the template's turns (of calls: made when asked for)."""

    render: Render
    shape: TurnShape
    calls: Callable[[], CallShape]
    tools: str = ""


@dataclass(frozen=True, slots=True)
class _Turn:
    """An assistant turn: the text that inference would have before it, and the text up to its end."""

    before: str
    after: str
    weight: float = 1.0


def needed_renders(chosen: Chosen) -> list[tuple[Conversation, bool]]:
    """The renders that a layout surely asks for: rendered ahead, many rows at once."""
    requests: list[tuple[Conversation, bool]] = []
    for answer in chosen.answers:
        messages = (*chosen.prompt, *answer)
        for place in range(len(chosen.prompt), len(messages)):
            if messages[place].role == "assistant":
                requests.append((messages[:place], True))
        requests.append((messages, False))
    return requests


def chat_layouts(scribe: Scribe, chosen: Chosen) -> list[Layout]:
    """One layout; or, for one answer of several turns under a template that rewrites earlier turns, one a turn.

    Such a template (reasoning stripped from history, another token at the last turn's end) shows at
    inference a turn otherwise than it was generated: so each turn is trained after the history that
    inference would render (TRAPS 23). Pairs cannot be split that way: RowError.
    """
    prompt = chosen.prompt
    _check_supported(scribe, (*prompt, *(message for answer in chosen.answers for message in answer)))
    turns = [
        [replace(turn, weight=weight) for turn, weight in zip(_turns(scribe, prompt, answer), weights, strict=True)]
        for answer, weights in zip(chosen.answers, chosen.weights, strict=True)
    ]
    head = turns[0][0].before
    if all(_chained(row) for row in turns):
        return [Layout(head, tuple(_parts(row) for row in turns), whole=chosen.whole)]
    if len(turns) > 1:
        raise RowError("the template rewrites earlier turns: a pair that goes on for several turns cannot be trained")
    own = [turn for turn in turns[0] if turn.weight]
    return [Layout(turn.before, ((Part(turn.after[len(turn.before) :], turn.weight),),)) for turn in own]


def _check_supported(scribe: Scribe, messages: Conversation) -> None:
    """Raises RowError where a row has tools or calls and the template has no way to write them."""
    if scribe.tools and scribe.calls().tools_refused:
        raise RowError(f"the row has tools: {scribe.calls().tools_refused}", fatal=True)
    if any(message.calls for message in messages) and scribe.calls().refused:
        raise RowError(f"the row has tool calls: {scribe.calls().refused}", fatal=True)


def _check_kept(scribe: Scribe, messages: Conversation, text: str) -> None:
    """Raises RowError where the template left out what was said before the last turn, or the tools.

    What assistants said and thought earlier may be rewritten: it was trained at its own turn, if at all.
    """
    missing = missing_tool(tool_list(scribe.tools) or [], text) if scribe.tools else ""
    if missing:
        raise RowError(f"the chat template drops the tool {missing!r}", fatal=True)
    for message in messages:
        if message.role in ("system", "user") and message.content.strip() not in text:
            raise RowError(f"the chat template drops or changes the {message.role} message", fatal=True)
        if message.role == "tool" and not holds_result(text, message.content):
            raise RowError("the chat template drops or changes the result of a tool call", fatal=True)
        for call in message.calls:
            if missing := missing_of_call(call, text):
                raise RowError(f"the chat template drops an earlier tool call: {missing} is not written", fatal=True)


def _turns(scribe: Scribe, prompt: Conversation, answer: Conversation) -> list[_Turn]:
    """The answer's assistant turns. The last one is rendered as the end of the conversation; an earlier one too,
    unless what inference sees at the next turn shows it, word for word, as an ordinary turn."""
    messages = (*prompt, *answer)
    places = [index for index in range(len(prompt), len(messages)) if messages[index].role == "assistant"]
    befores = [scribe.render(messages[:place], True) for place in places]
    turns = []
    for place, before, later in zip(places, befores, [*befores[1:], ""], strict=True):
        message = messages[place]
        shown = _shown(scribe.shape, before, message, later)
        turns.append(shown or _turn(scribe, messages[:place], message, before))
    _check_kept(scribe, messages[: places[-1]], befores[-1])
    return turns


def _shown(shape: TurnShape, before: str, message: Message, later: str) -> _Turn | None:
    """The turn as the next prompt shows it, where it has the shape of an ordinary turn."""
    if message.calls or message.reasoning or shape.extra or not later.startswith(before):
        return None
    for form in _forms(message.content):
        after = before + shape.lead + form + shape.ending
        if later.startswith(after):
            return _Turn(before, after)
    return None


def _forms(content: str) -> tuple[str, ...]:
    """The text as it is, and with white space taken from its ends, as templates do."""
    ends = (content, content.rstrip("\n"), content.rstrip())
    return tuple(dict.fromkeys(form for end in ends for form in (end, end.lstrip("\n"), end.lstrip())))


def _turn(scribe: Scribe, history: Conversation, answer: Message, before: str) -> _Turn:
    full = scribe.render((*history, answer), False)
    if answer.calls:
        shape = scribe.calls()
        return _turn_of_calls(scribe, history, answer, before, _up_to_end(full, shape.stop, shape.after))
    tail, ending = scribe.shape.tail, scribe.shape.ending
    end = _up_to_end(full, tail, "").removesuffix(tail)
    if answer.reasoning:
        return _reasoned_turn(scribe, history, answer, before, end)
    for form in _forms(answer.content):
        inner = _written(before, end, form, scribe.shape.lead)
        if inner is not None:
            return _Turn(before, before + inner + ending)
    raise _changed(answer, end)


def _up_to_end(full: str, stop: str, after: str) -> str:
    """The render up to the turn's last token."""
    if not full.endswith(stop + after):
        raise RowError(f"the template ends this answer by {full[-20:]!r} and others by {stop + after!r}", fatal=True)
    return full[: len(full) - len(after)]


def _changed(answer: Message, full: str) -> RowError:
    stripped = answer.content.rpartition(END_OF_THINKING)[2].strip()
    if END_OF_THINKING in answer.content and full.endswith(stripped):
        return RowError(
            "the chat template strips the reasoning from the very answer that has it, so it would not be trained: "
            "give a template that keeps it, or rows without reasoning",
            fatal=True,
        )
    return RowError(f"the template changes the answer: {_short(answer.content)} became {_short(full)}", fatal=True)


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


# --- turns with reasoning or calls: what the template writes between the generation prompt and the end


def _reasoned_turn(scribe: Scribe, history: Conversation, answer: Message, before: str, end: str) -> _Turn:
    inner = _after_prompt(scribe, history, before, end)
    form = next((form for form in _forms(answer.content) if inner.endswith(form)), None)
    if form is None:
        raise _changed(answer, end)
    _check_reasoning(answer, inner[: len(inner) - len(form)])
    return _Turn(before, before + inner + scribe.shape.ending)


def _turn_of_calls(scribe: Scribe, history: Conversation, answer: Message, before: str, end: str) -> _Turn:
    inner = _after_prompt(scribe, history, before, end)
    if not holds(inner, answer.content):
        raise RowError("the chat template drops the text beside the tool calls of an answer", fatal=True)
    for call in answer.calls:
        if missing := missing_of_call(call, inner):
            raise RowError(f"the chat template drops a tool call of the answer: {missing} is not written", fatal=True)
    _check_reasoning(answer, inner)
    return _Turn(before, before + inner)


def _check_reasoning(answer: Message, text: str) -> None:
    if answer.reasoning.strip() not in text:
        raise RowError(
            "the chat template drops the reasoning of the answer, so it would not be trained: "
            "give a template that writes `reasoning_content`, or rows without reasoning",
            fatal=True,
        )


def _after_prompt(scribe: Scribe, history: Conversation, before: str, end: str) -> str:
    """What stands after the prompt, where the prompt is in the render; else after the same place of another render."""
    shape = scribe.shape
    if end.startswith(before):
        return end[len(before) :]
    head = before.removesuffix(shape.extra)
    if not (shape.extra and before.endswith(shape.extra) and end.startswith(head)):
        probe = scribe.render((*history, Message("assistant", PROBE_ANSWER)), False)
        tail = shape.lead + PROBE_ANSWER + shape.tail
        head = probe.removesuffix(tail)
        if not probe.endswith(tail) or not end.startswith(head):
            raise RowError(
                f"the template shows another prompt once the answer is there: inference would see {before[-40:]!r}, "
                f"the answer stands after {end[: len(before)][-40:]!r}",
                fatal=True,
            )
    return end[len(head) :]


def _chained(turns: list[_Turn]) -> bool:
    """Whether every turn, as it was generated, is the head of what inference renders at the next."""
    return all(later.before.startswith(turn.after) for turn, later in pairwise(turns))


def _parts(turns: list[_Turn]) -> tuple[Part, ...]:
    parts = []
    place = len(turns[0].before)
    for turn in turns:
        if len(turn.before) > place:
            parts.append(Part(turn.before[place:], 0.0))
        parts.append(Part(turn.after[len(turn.before) :], turn.weight))
        place = len(turn.after)
    return tuple(parts)


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:30]}...{text[-27:]}")
