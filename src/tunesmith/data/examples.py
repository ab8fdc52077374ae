"""Examples as JSON lines: held-out examples are kept beside their tokens, for comparisons and for looking at.

In: examples. Out: a file of one JSON object a line, and a sequence that reads it when it is asked for.
Must not know: formats, tokenizers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import overload

from tunesmith.data.types import Conversation, Example, Json, Message, ToolCall


def example_line(example: Example) -> bytes:
    """One example as a line."""
    return json.dumps(asdict(example), ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def example_of(line: bytes) -> Example:
    """The example of a line that `example_line` wrote."""
    values = json.loads(line)
    prompt, answers = values["prompt"], values["answers"]
    texts = tuple(answer for answer in answers if isinstance(answer, str))
    return Example(
        id=values["id"],
        sha=values["sha"],
        prompt=prompt if isinstance(prompt, str) else _conversation(prompt),
        answers=texts or tuple(_conversation(answer) for answer in answers),
        value=values["value"],
        accepted=tuple(values["accepted"]),
        tags=values["tags"],
        tools=values["tools"],
        scores=tuple(values["scores"]),
        label=values["label"],
        weight=values.get("weight", 1.0),
    )


def _conversation(messages: Sequence[Mapping[str, Json]]) -> Conversation:
    return tuple(_message(values) for values in messages)


def _message(values: Mapping[str, Json]) -> Message:
    calls = values["calls"]
    assert isinstance(calls, list)
    plain = {name: value for name, value in values.items() if name != "calls"}
    return Message(**plain, calls=tuple(ToolCall(**call) for call in calls if isinstance(call, dict)))  # type: ignore[arg-type]


class ExampleFile(Sequence[Example]):
    """The examples of a file, read once, at the first look."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines: list[bytes] | None = None

    @property
    def lines(self) -> list[bytes]:
        """The lines of the file."""
        if self._lines is None:
            self._lines = self._path.read_bytes().splitlines(keepends=True) if self._path.is_file() else []
        return self._lines

    def __len__(self) -> int:
        return len(self.lines)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [example_of(line) for line in self.lines[index]]
        return example_of(self.lines[index])
