"""What the labels and scores of a file say as a whole: one class only, ties, answers scored against the choice.

In: examples, one by one. Out: notes with numbers. Must not know: files, tokenizers, how the notes are shown.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tunesmith.data.types import Example

RARE = 0.05  # below this share of either label, KTO's two losses cannot be balanced by their weights


@dataclass(slots=True)
class Feedback:
    """Counts over a file's examples."""

    num_desirable: int = 0
    num_undesirable: int = 0
    num_scored_pairs: int = 0
    num_ties: int = 0
    num_reversed: int = 0

    def add(self, example: Example) -> None:
        """Counts one example in."""
        if example.label is not None:
            self.num_desirable += example.label
            self.num_undesirable += not example.label
        if len(example.scores) == 2 == len(example.answers):
            self.num_scored_pairs += 1
            self.num_ties += example.scores[0] == example.scores[1]
            self.num_reversed += example.scores[0] < example.scores[1]

    def merge(self, other: Feedback) -> None:
        """Counts another part of the file in."""
        self.num_desirable += other.num_desirable
        self.num_undesirable += other.num_undesirable
        self.num_scored_pairs += other.num_scored_pairs
        self.num_ties += other.num_ties
        self.num_reversed += other.num_reversed

    def notes(self) -> list[str]:
        """Warnings, each with its numbers."""
        notes = []
        num_labels = self.num_desirable + self.num_undesirable
        fewer = min(self.num_desirable, self.num_undesirable)
        counts = f"{self.num_desirable} desirable, {self.num_undesirable} undesirable"
        if num_labels and not fewer:
            notes.append(f"WARNING: all {num_labels} labels say the same ({counts}): there is nothing to tell apart.")
        elif num_labels and fewer < RARE * num_labels:
            notes.append(f"WARNING: the labels are far from even ({counts}).")
        if self.num_ties:
            notes.append(f"WARNING: {self.num_ties} of {self.num_scored_pairs} pairs have equal scores.")
        if self.num_reversed:
            total = self.num_scored_pairs
            notes.append(f"WARNING: {self.num_reversed} of {total} pairs give the rejected answer the higher score.")
        return notes


def feedback_of(examples: Iterable[Example]) -> Feedback:
    """The counts over all examples."""
    feedback = Feedback()
    for example in examples:
        feedback.add(example)
    return feedback
