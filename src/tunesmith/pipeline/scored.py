"""Rows with the scores of their answers: what is written of them, which are kept, which pairs they make.

In: rows, their examples, a score an answer. Out: the fields of new rows. Must not know: models, files, how a score was
made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tunesmith.data.split import prompt_sha
from tunesmith.data.types import Conversation, Example, Json
from tunesmith.errors import DataError

COLUMN = "score"


@dataclass(frozen=True, slots=True)
class Scored:
    """A row with a score for each of its answers, or why it has none."""

    id: str
    fields: Mapping[str, Json]
    example: Example | None = None
    scores: tuple[float, ...] = ()
    reason: str = ""

    @property
    def figure(self) -> float | None:
        """What filters go by: an answer's score; of a pair by how much the chosen one wins; the best of several."""
        if not self.scores:
            return None
        return self.scores[0] - self.scores[1] if len(self.scores) == 2 else max(self.scores)


def columns_of(column: str) -> tuple[str, str, str]:
    """The columns that are added: of every row; of a pair's two answers, as preference files have them."""
    return column, f"chosen_{column}", f"rejected_{column}"


def refuse_taken(rows: Sequence[Scored], column: str) -> None:
    """DataError where a row has one of the columns already: nothing of the file's is overwritten."""
    for row in rows:
        taken = [name for name in columns_of(column) if name in row.fields]
        if taken:
            remedy = "Name another one with --column, or leave that column out of the file."
            raise DataError(f"the rows have a column `{taken[0]}` already", where=row.id, remedy=remedy)


def with_scores(row: Scored, column: str) -> dict[str, Json]:
    """The row's fields, then its scores: one number; of a pair the difference, and each side's; of several a list."""
    one, chosen, rejected = columns_of(column)
    if len(row.scores) == 2:
        return {**row.fields, one: row.figure, chosen: row.scores[0], rejected: row.scores[1]}
    return {**row.fields, one: list(row.scores) if len(row.scores) > 2 else row.figure}


def kept(rows: Sequence[Scored], *, above: float | None, top: float | None) -> list[Scored]:
    """The rows whose figure is above `above` and among the `top` share of those that have one, in their order.

    The share is rounded up; of equal figures the earlier rows go first. Without a limit all rows stay.
    """
    if above is None and top is None:
        return list(rows)
    figures = {number: row.figure for number, row in enumerate(rows) if row.figure is not None}
    chosen = sorted(figures, key=lambda number: (-figures[number], number))
    if top is not None:
        chosen = chosen[: math.ceil(top * len(chosen) - 1e-9)]
    return [rows[number] for number in sorted(chosen) if above is None or figures[number] > above]


def make_pairs(rows: Sequence[Scored], column: str) -> list[Scored]:
    """Of each prompt the best and the worst of all its answers in the file, where their scores differ.

    The pairs stand in the order in which their prompts first appear; of equal scores the earlier answer is taken.
    """
    groups: dict[str, list[tuple[float, Scored, int]]] = {}
    for row in rows:
        if row.example is not None:
            group = groups.setdefault(prompt_sha(row.example), [])
            group += [(score, row, number) for number, score in enumerate(row.scores)]
    pairs = []
    for group in groups.values():
        best, worst = max(group, key=lambda each: each[0]), min(group, key=lambda each: each[0])
        if best[0] > worst[0]:
            pairs.append(_pair(best, worst, column))
    return pairs


def _pair(best: tuple[float, Scored, int], worst: tuple[float, Scored, int], column: str) -> Scored:
    (won, winner, first), (lost, loser, second) = best, worst
    assert winner.example is not None
    assert loser.example is not None
    fields: dict[str, Json] = {
        "prompt": _plain(winner.example.prompt, winner),
        "chosen": _plain(winner.example.answers[first], winner),
        "rejected": _plain(loser.example.answers[second], loser),
    }
    fields["rows"] = list(dict.fromkeys((winner.id, loser.id)))
    return Scored(winner.id, fields, scores=(won, lost))


def _plain(said: Conversation | str, row: Scored) -> Json:
    """Text as it is; turns as messages. DataError for what such a row could not say."""
    assert row.example is not None
    if isinstance(said, str):
        return said
    if row.example.tools or any(turn.calls or turn.reasoning or turn.role == "tool" for turn in said):
        remedy = "Score the file without --make-pairs, and leave such rows out."
        raise DataError("pairs cannot be made of turns with tools or reasoning", where=row.id, remedy=remedy)
    return [{"role": turn.role, "content": turn.content} for turn in said]
