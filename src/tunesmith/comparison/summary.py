"""The summary of a comparison: every figure of every stage, the differences, and what they allow to say.

In: raw records of the stages. Out: one frozen record, and its JSON. Must not know: models, files, HTML.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

from tunesmith.comparison.collect import StageRecord
from tunesmith.comparison.figures import (
    FIGURES,
    PairFacts,
    Sampling,
    Values,
    all_estimates,
    compare_values,
    has_value,
    is_exact,
    pair_facts,
    stage_values,
    style_rule,
)
from tunesmith.comparison.rows import Rows
from tunesmith.comparison.statistics import LEVEL, Estimate
from tunesmith.comparison.words import Difference, Finding, findings, headline
from tunesmith.recipe.models import Compare, Recipe
from tunesmith.redact import redact
from tunesmith.version import VERSION

SUMMARY_VERSION = 1
"""Raised when a key of summary.json changes its name or meaning."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is said of a stage against the one before it: one sentence, and one finding a headline figure."""

    stage: str
    against: str
    sentence: str
    findings: tuple[Finding, ...]


@dataclass(frozen=True, slots=True)
class Summary:
    """Everything that a comparison measured."""

    run: str
    seed: int
    reference: str
    num_prompts: int
    num_pairs: int
    compare: Compare
    stages: Mapping[str, Mapping[str, Estimate]]
    differences: tuple[Difference, ...]
    verdicts: tuple[Verdict, ...]
    pairs: PairFacts
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StageAnswer:
    """What one stage said to one prompt. Marks are None where nothing says what is right."""

    greedy: str
    tokens: int
    stopped: bool
    exact: bool | None
    value: bool | None
    style: bool | None
    sampled: str | None
    sampled_style: bool | None


@dataclass(frozen=True, slots=True)
class Answered:
    """A held-out prompt with every stage's answers."""

    id: str
    prompt: str
    accepted: tuple[str, ...]
    answers: Mapping[str, StageAnswer]


def summarize(
    recipe: Recipe, records: Sequence[StageRecord], rows: Rows, *, reference: str, notes: Sequence[str] = ()
) -> Summary:
    """Figures, differences and verdict from the stages' records."""
    sampling = Sampling(recipe.compare.bootstrap_samples, recipe.seed)
    by_name = {record.name: record for record in records}
    held = by_name.get(reference)
    values = {record.name: stage_values(record, held, rows, recipe.compare) for record in records}
    stages = {name: all_estimates(raw, sampling) for name, raw in values.items()}
    names = list(by_name)
    differences = tuple(_difference(stage, against, values, sampling) for against, stage in pairwise(names))
    return Summary(
        run=recipe.name,
        seed=recipe.seed,
        reference=reference,
        num_prompts=len(rows.questions),
        num_pairs=len(rows.pairs),
        compare=recipe.compare,
        stages=stages,
        differences=differences,
        verdicts=tuple(_verdict(difference, stages) for difference in differences),
        pairs=pair_facts(rows.pairs, sampling),
        notes=(*notes, *rows.notes),
    )


def as_json(summary: Summary) -> dict[str, object]:
    """The content of compare/summary.json."""
    counts = {"num_prompts": summary.num_prompts, "num_pairs": summary.num_pairs}
    compare = summary.compare
    return {
        "version": SUMMARY_VERSION,
        "tunesmith": VERSION,
        "run": summary.run,
        "seed": summary.seed,
        "reference": summary.reference,
        **counts,
        "settings": {
            "level": LEVEL,
            "bootstrap_samples": compare.bootstrap_samples,
            "max_new_tokens": compare.max_new_tokens,
            "temperature": compare.temperature,
            "style": None if compare.style is None else compare.style.model_dump(),
        },
        "stages": {name: {**_plain(figures), **counts} for name, figures in summary.stages.items()},
        "differences": [
            {"stage": entry.stage, "against": entry.against, "figures": _plain(entry.figures)}
            for entry in summary.differences
        ],
        "verdict": [_verdict_json(verdict) for verdict in summary.verdicts],
        "pairs": asdict(summary.pairs),
        "notes": list(summary.notes),
    }


def answered(compare: Compare, records: Sequence[StageRecord], rows: Rows) -> list[Answered]:
    """Every question with every stage's answers and their marks; without the secrets that rows may hold."""
    keeps = None if compare.style is None else style_rule(compare.style)
    lines: list[Answered] = []
    for number, question in enumerate(rows.questions):
        answers: dict[str, StageAnswer] = {}
        for record in records:
            text, answer = record.greedy_text[number], record.greedy[number]
            sampled = record.sampled_text[number] if record.sampled_text else None
            answers[record.name] = StageAnswer(
                greedy=redact(text),  # a report is handed on; figures are of the text as it was
                tokens=len(answer.ids),
                stopped=answer.stopped,
                exact=is_exact(text, question) if question.accepted else None,
                value=has_value(text, question.value) if question.value else None,
                style=None if keeps is None else keeps(text),
                sampled=None if sampled is None else redact(sampled),
                sampled_style=None if keeps is None or sampled is None else keeps(sampled),
            )
        accepted = tuple(map(redact, question.accepted))
        lines.append(Answered(question.id, redact(question.text), accepted, answers))
    return lines


def _difference(stage: str, against: str, values: Mapping[str, Mapping[str, Values]], sampling: Sampling) -> Difference:
    figures = {
        figure.key: compare_values(figure.key, values[stage][figure.key], values[against][figure.key], sampling)
        for figure in FIGURES
    }
    return Difference(stage, against, figures)


def _verdict(difference: Difference, stages: Mapping[str, Mapping[str, Estimate]]) -> Verdict:
    found = findings(difference, stages)
    return Verdict(difference.stage, difference.against, headline(difference, found), tuple(found))


def _verdict_json(verdict: Verdict) -> dict[str, object]:
    return {
        "stage": verdict.stage,
        "against": verdict.against,
        "sentence": verdict.sentence,
        "findings": [
            {"figure": finding.key, "outcome": finding.outcome, "text": finding.text} for finding in verdict.findings
        ],
    }


def _plain(figures: Mapping[str, Estimate]) -> dict[str, object]:
    return {key: asdict(figure) for key, figure in figures.items()}
