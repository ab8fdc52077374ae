"""Which rows are held out.

In: examples and a share. Out: the two sides. Must not know: tokenizers, files, seeds.
"""

from __future__ import annotations

from collections.abc import Sequence

from tunesmith.data.sources import content_sha
from tunesmith.data.types import Conversation, Example, Json, Message


def prompt_sha(example: Example) -> str:
    """sha256 of what identifies a row for the split: its prompt, or the text itself where the prompt is empty."""
    if isinstance(example.prompt, str):
        return content_sha(example.prompt or [str(answer) for answer in example.answers])
    return content_sha([*_listed(turns_json(example.prompt)), *([example.tools] if example.tools else [])])


def content_key(example: Example) -> str:
    """sha256 of everything that a loss could see of a row: its prompt, its answers, its label, scores and weight."""
    turns = [answer if isinstance(answer, str) else turns_json(answer) for answer in example.answers]
    judged: list[Json] = [] if example.label is None and not example.scores else [example.label, list(example.scores)]
    weight: list[Json] = [] if example.weight == 1 else [{"weight": example.weight}]
    return content_sha([prompt_sha(example), *turns, *judged, *weight])


def turns_json(messages: Conversation) -> Json:
    """Messages as JSON, for hashing: role and content, and whatever else a message has."""
    return [_turn(message) for message in messages]


def _turn(message: Message) -> list[Json]:
    more: list[Json] = [message.reasoning, message.name]
    calls: list[Json] = [[call.name, call.arguments] for call in message.calls]
    return [message.role, message.content, *([*more, calls] if any(more) or calls else [])]


def _listed(value: Json) -> list[Json]:
    assert isinstance(value, list)
    return value


def is_heldout(sha: str, fraction: float) -> bool:
    """Decided by the hash alone: a row never changes side when rows are added, removed or reordered."""
    return int(sha[:15], 16) < fraction * 16**15


def split_examples(examples: Sequence[Example], fraction: float) -> tuple[list[Example], list[Example]]:
    """The training and the held-out side; rows with one prompt always stand on one side."""
    if fraction == 0:
        return list(examples), []
    sides: tuple[list[Example], list[Example]] = ([], [])
    for example in examples:
        sides[is_heldout(prompt_sha(example), fraction)].append(example)
    return sides
