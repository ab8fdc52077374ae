"""Which turns of an example are trained, and where its prompt ends.

In: an example, the recipe's `train_on`. Out: prompt, answers and a flag for every assistant turn of an answer.
Must not know: templates, tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tunesmith.data.types import Conversation, Example, Message, RowError

TrainOn = Literal["assistant", "last_assistant", "all", "weights"]
NOTHING = "no trained turn"


@dataclass(frozen=True, slots=True)
class Chosen:
    """A conversation's prompt and answers; `trained` says it for every assistant turn of every answer.

    `whole`: every token is trained, those of the prompt too.
    """

    prompt: Conversation
    answers: tuple[Conversation, ...]
    trained: tuple[tuple[bool, ...], ...]
    whole: bool = False


def choose_turns(example: Example, train_on: TrainOn) -> Chosen:
    """The turns that are trained. One answer: what stands before its first trained turn belongs to the prompt,
    what stands after its last one is left out, as nothing there is trained.

    Raises RowError: fatal where weights are needed and missing, or there and not honoured; else where nothing
    is trained.
    """
    prompt = tuple(message for message in example.prompt if isinstance(message, Message))
    answers = tuple(tuple(message for message in answer if isinstance(message, Message)) for answer in example.answers)
    if len(answers) > 1:
        return Chosen(prompt, answers, tuple(_flags(prompt, answer, train_on) for answer in answers))
    messages = (*prompt, *answers[0])
    if train_on == "weights":
        flags = _weighted(messages, 0)
    else:
        flags = [False] * len(prompt) + _spread(answers[0], _flags(prompt, answers[0], train_on))
    places = [index for index, flag in enumerate(flags) if flag]
    if not places:
        raise RowError(NOTHING)
    first, end = places[-1 if train_on == "all" else 0], places[-1] + 1
    kept = tuple(flags[index] for index in range(first, end) if messages[index].role == "assistant")
    return Chosen(messages[:first], (messages[first:end],), (kept,), whole=train_on == "all")


def _flags(prompt: Conversation, answer: Conversation, train_on: TrainOn) -> tuple[bool, ...]:
    turns = [message for message in answer if message.role == "assistant"]
    if not turns:
        raise RowError(NOTHING)
    if train_on == "weights":
        messages = (*prompt, *answer)
        pairs = zip(answer, _weighted(messages, len(prompt)), strict=True)
        flags = tuple(flag for message, flag in pairs if message.role == "assistant")
        if not any(flags):
            raise RowError(NOTHING)
        return flags
    if any(turn.weight is not None and turn.weight != 1 for turn in turns) and train_on == "assistant":
        raise RowError(
            "an assistant turn has weight 0 and would be trained: `train_on: weights` honours it", fatal=True
        )
    if train_on == "last_assistant":
        return (*[False] * (len(turns) - 1), True)
    return (True,) * len(turns)


def _spread(answer: Conversation, flags: tuple[bool, ...]) -> list[bool]:
    """Flags of the assistant turns as flags of all turns."""
    left = iter(flags)
    return [message.role == "assistant" and next(left) for message in answer]


def _weighted(messages: Conversation, start: int) -> list[bool]:
    """Flags by weight for the messages from `start` on; an assistant turn without one counts as 1 beside others."""
    turns = [message for message in messages if message.role == "assistant"]
    if all(message.weight is None for message in turns):
        raise RowError("`train_on: weights` needs a weight on the assistant turns, and this row has none", fatal=True)
    for message in messages:
        if message.weight not in (None, 0, 1):
            raise RowError(f"weight {message.weight} of a message: only 0 and 1 can be trained", fatal=True)
        if message.role != "assistant" and message.weight:
            raise RowError(f"weight 1 on a {message.role} turn: only assistant turns can be trained", fatal=True)
    return [message.role == "assistant" and message.weight != 0 for message in messages[start:]]
