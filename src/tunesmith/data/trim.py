"""What may be left out of an over-long example: whole turns, and of raw text whole tokens at its start.

In: the turns of an example, a way to count tokens. Out: the longest example that fits and what was left out;
None where nothing fits. Must not know: templates, tokenizers, files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from tunesmith.data.turns import Chosen
from tunesmith.data.types import Conversation

Count = Callable[[Chosen], int]
"""Tokens of the prompt and the longest answer."""


def without_oldest_turns(chosen: Chosen, count: Count, limit: int) -> tuple[Chosen, int] | None:
    """With as few of the oldest turns of the prompt left out as fits, and how many.

    System messages stay, and the rest begins at a user's turn: a template takes it for a conversation.
    """
    prompt = chosen.prompt
    head = next((index for index, message in enumerate(prompt) if message.role != "system"), len(prompt))
    starts = [index for index in range(head + 1, len(prompt)) if prompt[index].role == "user"]
    options = [replace(chosen, prompt=(*prompt[:head], *prompt[start:])) for start in starts]
    place = _first_that_fits(options, count, limit)
    return None if place is None else (options[place], starts[place] - head)


def without_last_turns(chosen: Chosen, count: Count, limit: int) -> tuple[Chosen, int] | None:
    """With as few of the last turns of each answer left out as fits, and how many in all.

    An answer still ends with a trained turn of the assistant; the prompt is left alone, so all keep the same.
    """
    answers, weights, num_left_out = [], [], 0
    for answer, given in zip(chosen.answers, chosen.weights, strict=True):
        options = [replace(chosen, answers=(kept,), weights=(own,)) for kept, own in _heads(answer, given)]
        place = _first_that_fits(options, count, limit)
        if place is None:
            return None
        answers.append(options[place].answers[0])
        weights.append(options[place].weights[0])
        num_left_out += len(answer) - len(answers[-1])
    return replace(chosen, answers=tuple(answers), weights=tuple(weights)), num_left_out


def _heads(answer: Conversation, weights: tuple[float, ...]) -> list[tuple[Conversation, tuple[float, ...]]]:
    """The answer up to each of its trained turns, the longest first."""
    places = [index for index, message in enumerate(answer) if message.role == "assistant"]
    return [(answer[: places[i] + 1], weights[: i + 1]) for i in reversed(range(len(places))) if weights[i]]


def _first_that_fits(options: Sequence[Chosen], count: Count, limit: int) -> int | None:
    """The first of ever shorter options that fits, by halving; None where even the last does not."""
    if not options or count(options[-1]) > limit:
        return None
    low, high = 0, len(options) - 1
    while low < high:
        middle = (low + high) // 2
        if count(options[middle]) <= limit:
            high = middle
        else:
            low = middle + 1
    return low


def split_ids(ids: Sequence[int], *, room: int, least: int) -> list[list[int]]:
    """Ids in pieces of `room`; the last has at least `least`, taken from the one before it where need be."""
    pieces = [list(ids[start : start + room]) for start in range(0, len(ids), room)]
    missing = least - len(pieces[-1])
    if len(pieces) > 1 and missing > 0:
        pieces[-1] = pieces[-2][-missing:] + pieces[-1]
        pieces[-2] = pieces[-2][:-missing]
    return pieces
