"""Examples made on the spot for the audit's tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tunesmith.data.audit.findings import Finding
from tunesmith.data.audit.subject import SourceRange, Subject
from tunesmith.data.types import Example, Message

PROSE = (
    "The keeper of the lighthouse walked down to the harbour every morning, looked at the boats that had come in "
    "during the night, asked the fishermen about the wind and the price of herring, and then climbed the hill again "
    "before the bells of the village rang for the first time."
)


def sft(place: int, prompt: str, answer: str, *, system: str = "") -> Example:
    head = (Message("system", system),) if system else ()
    turns = (*head, Message("user", prompt))
    return Example(f"rows.jsonl:{place + 1}", f"sha{place}", turns, ((Message("assistant", answer),),))


def pair(place: int, prompt: str, *answers: str, scores: Sequence[float] = ()) -> Example:
    sides = tuple((Message("assistant", answer),) for answer in answers)
    return Example(f"rows.jsonl:{place + 1}", f"sha{place}", (Message("user", prompt),), sides, scores=tuple(scores))


def labeled(place: int, prompt: str, answer: str, label: bool) -> Example:
    answers = ((Message("assistant", answer),),)
    return Example(f"rows.jsonl:{place + 1}", f"sha{place}", (Message("user", prompt),), answers, label=label)


def clean(count: int) -> list[Example]:
    """Rows in which no check finds anything."""
    return [
        sft(
            place, f"What stands on page {place} of book {place * 7}?", f"A tale of {place} geese and {place + 3} cats."
        )
        for place in range(count)
    ]


def subject(
    examples: Sequence[Example],
    *,
    heldout: Sequence[Example] = (),
    evaluations: Mapping[str, Sequence[Example]] | None = None,
) -> Subject:
    return Subject(
        examples,
        heldout=heldout,
        evaluations=evaluations or {},
        sources=[SourceRange("rows.jsonl", 0)],
        heldout_paths=["held.jsonl"] if heldout else [],
    )


def only(findings: Sequence[Finding]) -> Finding:
    assert len(findings) == 1, [finding.kind for finding in findings]
    return findings[0]


def lines(finding: Finding) -> list[int]:
    """The line numbers of the rows that a finding names."""
    return [int(row_id.rpartition(":")[2]) for row_id in finding.ids]
