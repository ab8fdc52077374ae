"""The figures of a comparison: what each is called, what it means, and how it is computed from raw records.

In: raw records of every stage, the rows they were made on. Out: one estimate a figure and stage, and the
differences between stages. Must not know: models, files, how a report looks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from tunesmith.comparison.collect import StageRecord
from tunesmith.comparison.rows import WRONG_ANSWER, Pair, Question, Rows, branch_lengths
from tunesmith.comparison.statistics import Estimate, difference, exact, flipped, mean, missing, share, shifted
from tunesmith.recipe.models import Compare, Style

Unit = Literal["share", "nats", "tokens"]
Better = Literal["higher", "neither"]


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure's name in the summary, its title, unit, direction and definition."""

    key: str
    title: str
    unit: Unit
    better: Better
    definition: str


FIGURES: tuple[Figure, ...] = (
    Figure(
        "exact_accuracy",
        "Exact answers",
        "share",
        "higher",
        "Share of held-out prompts whose greedy answer, stripped, equals an accepted answer, character for character.",
    ),
    Figure(
        "value_accuracy",
        "Answers with the right value",
        "share",
        "higher",
        "Share of held-out prompts whose greedy answer contains the bare value as a whole word. It shows knowledge "
        "that is put in other words than the accepted answer, and also counts rambling that happens to hit the value.",
    ),
    Figure(
        "style_share",
        "Answers in the preferred style",
        "share",
        "higher",
        "Share of sampled answers that keep the recipe's style rule. The rule looks at form and not at truth.",
    ),
    Figure(
        "preference_accuracy",
        "Pairs ranked right, against the reference",
        "share",
        "higher",
        "Share of held-out pairs whose chosen answer gained more log-probability over the reference than the rejected "
        "one (a positive margin of implicit rewards). A tie counts half, so the reference itself has exactly 50 %.",
    ),
    Figure(
        "preference_accuracy_wrong_answer",
        "Wrong-answer pairs ranked right",
        "share",
        "higher",
        "The same share, on pairs whose rejected answer is false and not merely in another style (tag `kind: value`). "
        "They are not part of the figure above.",
    ),
    Figure(
        "logprob_accuracy",
        "Pairs ranked right, by log-probability",
        "share",
        "higher",
        "Share of held-out pairs whose chosen answer has the higher summed log-probability; no reference is involved. "
        "Longer answers have lower sums, so it leans to the shorter answer of a pair.",
    ),
    Figure(
        "kl",
        "KL to the reference",
        "nats",
        "neither",
        "How far the stage has moved: Monte-Carlo estimate of KL(stage || reference) in nats an answer. One answer a "
        "prompt is drawn from the stage at temperature 1; the sum of its tokens' log p(stage) - log p(reference) is "
        "averaged over prompts. Answers are cut at the longest generated length. It can come out below 0 by chance.",
    ),
    Figure("answer_tokens", "Length of an answer", "tokens", "neither", "Mean tokens of a greedy answer."),
    Figure(
        "stopped",
        "Answers that end by themselves",
        "share",
        "neither",
        "Share of greedy answers that ended with a stop token before the longest generated length.",
    ),
)

FIGURE = {figure.key: figure for figure in FIGURES}


@dataclass(frozen=True, slots=True)
class Values:
    """A figure's raw values, one a row, with the rows' clusters; `by_definition` where no row is needed."""

    values: list[float]
    clusters: list[str]
    reason: str = ""
    by_definition: float | None = None


@dataclass(frozen=True, slots=True)
class PairFacts:
    """Mean tokens of both answers, the share of pairs whose chosen answer is longer (equal: half), pairs a kind."""

    num_prompts: int
    tokens_chosen: float | None
    tokens_rejected: float | None
    chosen_longer: Estimate
    kinds: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Sampling:
    """Settings of the bootstrap."""

    samples: int
    seed: int


def is_exact(text: str, question: Question) -> bool:
    """Whether the stripped answer equals an accepted one."""
    return text.strip() in question.accepted


def has_value(text: str, value: str) -> bool:
    """Whether `value` stands in the answer as a whole word: `12` is not in `1200`."""
    return re.search(rf"(?<!\w){re.escape(value)}(?!\w)", text) is not None


def style_rule(style: Style) -> Callable[[str], bool]:
    """The recipe's style rule as a predicate on answers; the recipe has checked that its pattern compiles."""
    pattern = re.compile(style.pattern)

    def keeps(text: str) -> bool:
        short = style.max_words is None or len(text.split()) <= style.max_words
        return short and pattern.fullmatch(text.strip()) is not None

    return keeps


def win(margin: float) -> float:
    """1 for a positive margin, 0 for a negative one, a half for a tie."""
    return 0.5 if margin == 0 else float(margin > 0)


def stage_values(record: StageRecord, reference: StageRecord | None, rows: Rows, compare: Compare) -> dict[str, Values]:
    """Raw values of every figure of one stage."""
    found = _question_values(record, rows, compare)
    is_reference = reference is not None and record.name == reference.name
    wrong = [number for number, pair in enumerate(rows.pairs) if pair.kind == WRONG_ANSWER]
    others = [number for number, pair in enumerate(rows.pairs) if pair.kind != WRONG_ANSWER]
    parts = {"preference_accuracy": others or wrong, "preference_accuracy_wrong_answer": wrong if others else []}
    for key, numbers in parts.items():
        clusters = [rows.pairs[number].cluster for number in numbers]
        if not numbers:
            found[key] = Values([], [], rows.no_pairs or "no held-out pair has the tag `kind: value`")
        elif reference is None:
            found[key] = Values([], [], _NO_REFERENCE)
        elif is_reference:
            found[key] = Values([0.5] * len(numbers), clusters, _IS_REFERENCE, 0.5)
        else:
            found[key] = Values([win(_margin(record, reference, number)) for number in numbers], clusters)
    wins = [win(chosen - rejected) for chosen, rejected in record.pairs]
    found["logprob_accuracy"] = Values(wins, [pair.cluster for pair in rows.pairs], rows.no_pairs)
    found["kl"] = _kl(record, reference, rows)
    return found


_IS_REFERENCE = "this stage is the reference"
_NO_REFERENCE = "the reference is a stage that is not finished"


def _question_values(record: StageRecord, rows: Rows, compare: Compare) -> dict[str, Values]:
    ids = [question.id for question in rows.questions]
    greedy = list(zip(rows.questions, record.greedy_text, strict=True))
    graded = [(question, text) for question, text in greedy if question.accepted]
    valued = [(question, text, question.value) for question, text in greedy if question.value]
    found = {
        "exact_accuracy": Values(
            [float(is_exact(text, question)) for question, text in graded],
            [question.id for question, _ in graded],
            rows.no_questions or "no prompt has an accepted answer",
        ),
        "value_accuracy": Values(
            [float(has_value(text, value)) for _, text, value in valued],
            [question.id for question, _, _ in valued],
            rows.no_questions or "no prompt has a bare value",
        ),
        "answer_tokens": Values([float(len(answer.ids)) for answer in record.greedy], ids, rows.no_questions),
        "stopped": Values([float(answer.stopped) for answer in record.greedy], ids, rows.no_questions),
    }
    if compare.style is None:
        found["style_share"] = Values([], [], "the recipe has no `compare.style`")
    else:
        keeps = style_rule(compare.style)
        found["style_share"] = Values([float(keeps(text)) for text in record.sampled_text], ids, rows.no_questions)
    return found


def _margin(record: StageRecord, reference: StageRecord, number: int) -> float:
    """Margin of implicit rewards at beta 1; its sign is the same at every beta."""
    chosen, rejected = record.pairs[number]
    reference_chosen, reference_rejected = reference.pairs[number]
    return (chosen - reference_chosen) - (rejected - reference_rejected)


def _kl(record: StageRecord, reference: StageRecord | None, rows: Rows) -> Values:
    ids = [question.id for question in rows.questions]
    if reference is None:
        return Values([], [], _NO_REFERENCE)
    if record.name == reference.name and ids:
        return Values([0.0] * len(ids), ids, _IS_REFERENCE, 0.0)
    deltas = [own - other for own, other in zip(record.own, record.reference, strict=True)]
    return Values(deltas, ids, rows.no_questions)


def estimate(key: str, raw: Values, sampling: Sampling) -> Estimate:
    """The figure `key` with its interval."""
    if not raw.values:
        return missing(raw.reason)
    if raw.by_definition is not None:
        return exact(raw.by_definition, len(raw.values), raw.reason)
    summary = share if FIGURE[key].unit == "share" else mean
    return summary(raw.values, raw.clusters, samples=sampling.samples, seed=sampling.seed)


def compare_values(key: str, stage: Values, other: Values, sampling: Sampling) -> Estimate:
    """`stage` less `other` on the same rows, with its interval."""
    if not stage.values or not other.values:
        return missing(stage.reason or other.reason)
    if other.by_definition is not None:
        return shifted(estimate(key, stage, sampling), other.by_definition)
    if stage.by_definition is not None:
        return flipped(shifted(estimate(key, other, sampling), stage.by_definition))
    return difference(stage.values, other.values, stage.clusters, samples=sampling.samples, seed=sampling.seed)


def pair_facts(pairs: Sequence[Pair], sampling: Sampling) -> PairFacts:
    """What the pairs look like, whatever a model makes of them."""
    lengths = [branch_lengths(pair) for pair in pairs]
    clusters = [pair.cluster for pair in pairs]
    longer = [win(chosen - rejected) for chosen, rejected in lengths]
    kinds: dict[str, int] = {}
    for pair in pairs:
        kinds[pair.kind or "untagged"] = kinds.get(pair.kind or "untagged", 0) + 1
    return PairFacts(
        num_prompts=len(set(clusters)),
        tokens_chosen=sum(chosen for chosen, _ in lengths) / len(pairs) if pairs else None,
        tokens_rejected=sum(rejected for _, rejected in lengths) / len(pairs) if pairs else None,
        chosen_longer=share(longer, clusters, samples=sampling.samples, seed=sampling.seed),
        kinds=kinds,
    )


def all_estimates(values: Mapping[str, Values], sampling: Sampling) -> dict[str, Estimate]:
    """Every figure of a stage, in the order of FIGURES."""
    return {figure.key: estimate(figure.key, values[figure.key], sampling) for figure in FIGURES}
