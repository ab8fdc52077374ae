"""The audit of examples, of a file and of a recipe.

In: examples, a source, or a recipe with a way to count tokens. Out: an audit.
Must not know: single checks, how an audit is shown, tokenizers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.data.audit.checks import run_checks
from tunesmith.data.audit.findings import Audit, Fact
from tunesmith.data.audit.subject import Lost, SourceRange, Subject
from tunesmith.data.formats import to_examples
from tunesmith.data.sources import iter_rows
from tunesmith.data.split import split_examples
from tunesmith.data.types import BadRow, Example, Row
from tunesmith.recipe.models import Recipe, Source, Stage

if TYPE_CHECKING:
    from tunesmith.data.render import Renderer

Measure = Callable[[Sequence[Example]], Sequence[int]]
"""The token count of each example, as `token_counter` makes it of a renderer."""


@dataclass(slots=True)
class ReadSource:
    """A source's examples and the rows that gave none. `raw` are the rows themselves, in the file's order."""

    examples: list[Example] = field(default_factory=list)
    lost: list[Lost] = field(default_factory=list)
    unfit: list[Lost] = field(default_factory=list)
    format: str = ""
    reason: str = ""


def audit_examples(
    examples: Sequence[Example],
    *,
    heldout: Sequence[Example] = (),
    evaluations: Mapping[str, Sequence[Example]] | None = None,
    lengths: Sequence[int] = (),
    max_length: int = 0,
    title: str = "examples",
) -> Audit:
    """Every check on examples that are at hand; `lengths` are their token counts, for truncation losses."""
    assert not lengths or len(lengths) == len(examples), "one token count an example"
    subject = Subject(examples, heldout, evaluations or {}, lengths, max_length)
    return Audit(title, (run_checks(subject, title),))


def audit_source(
    source: Source,
    *,
    heldout: Sequence[Source] = (),
    evaluations: Sequence[Source] = (),
    measure: Measure | None = None,
    max_length: int = 0,
) -> Audit:
    """Every check on one source. Raises DataError where it cannot be read at all; bad rows are a finding."""
    subject, facts = source_subject([source], heldout=heldout, evaluations=evaluations)
    subject = _measured(subject, measure, max_length)
    part = run_checks(subject, source.path)
    return Audit(source.path, (replace(part, facts=(*facts, *part.facts)),))


def audit_recipe(
    recipe: Recipe, *, evaluations: Sequence[Source] = (), measure: Callable[[Stage], Measure] | None = None
) -> Audit:
    """Every check on the training rows of each stage, against its held-out rows and the evaluation sets.

    `measure` gives the way to count a stage's tokens; without it truncation is not looked at.
    """
    parts = []
    for stage in recipe.stages:
        subject, facts = source_subject(stage.train, heldout=stage.heldout, evaluations=evaluations)
        train, held = split_examples(subject.examples, stage.heldout_fraction)
        if held:
            subject = _without_heldout(subject, train, held)
        subject = _measured(subject, measure(stage) if measure else None, stage.max_length)
        part = run_checks(subject, f"stage {stage.name} ({stage.method})")
        parts.append(replace(part, facts=(*facts, *part.facts)))
    return Audit(f"recipe {recipe.name}", tuple(parts))


def token_counter(renderer: Renderer) -> Measure:
    """Counts tokens as a stage's renderer sees them: of the untrimmed row."""

    def count(examples: Sequence[Example]) -> list[int]:
        return [
            rendered.num_tokens or sum(tree.num_tokens for tree in rendered.trees)
            for rendered in renderer.render_many(examples)
        ]

    return count


def source_subject(
    sources: Sequence[Source], *, heldout: Sequence[Source] = (), evaluations: Sequence[Source] = ()
) -> tuple[Subject, list[Fact]]:
    """What the checks look at, read from files, and how the files were read."""
    examples: list[Example] = []
    lost: list[Lost] = []
    unfit: list[Lost] = []
    ranges: list[SourceRange] = []
    facts: list[Fact] = []
    for source in sources:
        found = read_source(source)
        ranges.append(SourceRange(source.path, len(examples)))
        examples += found.examples
        lost += found.lost
        unfit += found.unfit
        name = "format" if len(sources) == 1 else f"format of {Path(source.path).name}"
        facts.append(Fact(name, f"{found.format} ({found.reason})"))
    subject = Subject(
        examples=examples,
        heldout=[example for source in heldout for example in read_source(source).examples],
        evaluations={source.path: read_source(source).examples for source in evaluations},
        lost=lost,
        unfit=unfit,
        sources=ranges,
        heldout_paths=[source.path for source in heldout],
    )
    return subject, facts


def read_source(source: Source) -> ReadSource:
    """A source's examples; rows that cannot be read or decoded are listed, not raised.

    Raises DataError where the whole source cannot be read, or its format is not known or mixed.
    """
    rows: list[Row] = []
    result = ReadSource()
    for row in iter_rows(source):
        if isinstance(row, Row):
            rows.append(row)
        else:
            result.unfit.append(_unfit(row, source))
    if not rows:
        return result
    decoded = to_examples(rows, source)
    result.examples = decoded.examples
    result.lost = [Lost(dropped.row.id, dropped.reason, source.path) for dropped in decoded.dropped]
    result.unfit += [_unfit(bad, source) for bad in decoded.bad]
    result.format, result.reason = decoded.format, decoded.reason
    return result


def _unfit(bad: BadRow, source: Source) -> Lost:
    """`found` may quote the row; it is masked with every other excerpt when it is shown."""
    return Lost(bad.id, f"{bad.field}: found {bad.found}; wanted {bad.wanted}", source.path)


def _measured(subject: Subject, measure: Measure | None, max_length: int) -> Subject:
    if measure is None or not max_length:
        return subject
    return replace(subject, lengths=measure(subject.examples), max_length=max_length)


def _without_heldout(subject: Subject, train: list[Example], held: list[Example]) -> Subject:
    """The subject after `heldout_fraction` moved rows to the held-out side; rows of one prompt moved together."""
    kept = {id(example) for example in train}
    starts = [source.start for source in subject.sources]
    before = [0] * (len(subject.examples) + 1)
    for place, example in enumerate(subject.examples):
        before[place + 1] = before[place] + (id(example) in kept)
    ranges = [replace(source, start=before[start]) for source, start in zip(subject.sources, starts, strict=True)]
    return replace(subject, examples=train, heldout=[*subject.heldout, *held], sources=ranges)
