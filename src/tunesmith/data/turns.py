"""Which turns of an example are trained, and where its prompt ends.

In: an example, the recipe's `train_on`. Out: prompt, answers and a weight for every assistant turn of an answer.
Must not know: templates, tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from tunesmith.data.types import Conversation, Example, Message, RowError

TrainOn = Literal["assistant", "last_assistant", "all", "weights"]
NOTHING = "no trained turn"


@dataclass(frozen=True, slots=True)
class Chosen:
    """A conversation's prompt and answers; `weights` says how much every assistant turn of every answer counts.

    A turn of weight 0 is not trained. `whole`: every token is trained, those of the prompt too.
    """

    prompt: Conversation
    answers: tuple[Conversation, ...]
    weights: tuple[tuple[float, ...], ...]
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
        return Chosen(prompt, answers, tuple(_weights(prompt, answer, train_on) for answer in answers))
    messages = (*prompt, *answers[0])
    if train_on == "weights":
        weights = _weighted(messages, 0)
    else:
        weights = [0.0] * len(prompt) + _spread(answers[0], _weights(prompt, answers[0], train_on))
    places = [index for index, weight in enumerate(weights) if weight]
    if not places:
        raise RowError(NOTHING)
    first, end = places[-1 if train_on == "all" else 0], places[-1] + 1
    kept = tuple(weights[index] for index in range(first, end) if messages[index].role == "assistant")
    return Chosen(messages[:first], (messages[first:end],), (kept,), whole=train_on == "all")


def _weights(prompt: Conversation, answer: Conversation, train_on: TrainOn) -> tuple[float, ...]:
    turns = [message for message in answer if message.role == "assistant"]
    if not turns:
        raise RowError(NOTHING)
    if train_on == "weights":
        messages = (*prompt, *answer)
        pairs = zip(answer, _weighted(messages, len(prompt)), strict=True)
        weights = tuple(weight for message, weight in pairs if message.role == "assistant")
        if not any(weights):
            raise RowError(NOTHING)
        return weights
    given = [turn.weight for turn in turns if turn.weight not in (None, 1)]
    if given and train_on == "assistant":
        what = f"an assistant turn has weight {given[0]:g} and would be trained as the others"
        raise RowError(f"{what}: `train_on: weights` honours it", fatal=True)
    if train_on == "last_assistant":
        return (*[0.0] * (len(turns) - 1), 1.0)
    return (1.0,) * len(turns)


def _spread(answer: Conversation, weights: tuple[float, ...]) -> list[float]:
    """Weights of the assistant turns as weights of all turns."""
    left = iter(weights)
    return [next(left) if message.role == "assistant" else 0.0 for message in answer]


def _weighted(messages: Conversation, start: int) -> list[float]:
    """Weights of the messages from `start` on; an assistant turn without one counts as 1 beside others."""
    turns = [message for message in messages if message.role == "assistant"]
    if all(message.weight is None for message in turns):
        raise RowError("`train_on: weights` needs a weight on the assistant turns, and this row has none", fatal=True)
    for message in messages:
        weight = message.weight or 0.0
        if not (math.isfinite(weight) and weight >= 0):
            raise RowError(f"weight {weight} of a message: it must be 0 or above", fatal=True)
        if message.role != "assistant" and weight:
            raise RowError(
                f"weight {weight:g} on a {message.role} turn: only assistant turns can be trained", fatal=True
            )
    return [_of_assistant(message) for message in messages[start:]]


def _of_assistant(message: Message) -> float:
    if message.role != "assistant":
        return 0.0
    return 1.0 if message.weight is None else float(message.weight)
