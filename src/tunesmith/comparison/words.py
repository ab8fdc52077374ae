"""Figures in words: numbers with their units, and what a difference does and does not show.

In: estimates. Out: text. Must not know: models, files, HTML.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from tunesmith.comparison.figures import FIGURE, Figure, Unit
from tunesmith.comparison.statistics import Estimate

Outcome = Literal["better", "worse", "open"]

NBSP = "\u00a0"
"""Between a number and its unit, so that a line never ends between them."""

HEADLINE = ("exact_accuracy", "style_share", "preference_accuracy", "preference_accuracy_wrong_answer")
"""Figures that the verdict speaks of. The others explain them and stand in the table."""


@dataclass(frozen=True, slots=True)
class Difference:
    """A stage against the one before it: one estimate a figure, `stage` less `against`."""

    stage: str
    against: str
    figures: Mapping[str, Estimate]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the verdict, in words. `open`: this many prompts cannot tell the two stages apart."""

    key: str
    outcome: Outcome
    title: str
    before: str
    after: str
    change: str
    spread: str
    conclusion: str

    @property
    def text(self) -> str:
        """The whole line."""
        spread = f" (95 % interval {self.spread})" if self.spread else ""
        return f"{self.title}: {self.before} → {self.after}, {self.change}{spread}: {self.conclusion}."


def number(value: float | None, unit: Unit) -> str:
    """A figure as it is printed: `93.5 %`, `4.21 nats`, `17.3 tokens`; a dash where there is none."""
    if value is None:
        return "–"
    if unit == "share":
        return f"{_plain(100 * value, 1)}{NBSP}%"
    return f"{_plain(value, 2 if unit == 'nats' else 1)}{NBSP}{unit}"


def bare_number(value: float | None, unit: Unit) -> str:
    """The number alone, for the ends of an interval."""
    if value is None:
        return "–"
    return _plain(100 * value, 1) if unit == "share" else _plain(value, 2 if unit == "nats" else 1)


def interval(estimate: Estimate, unit: Unit) -> str:
    """`92.0 to 97.5`; `by definition`; empty where there is none."""
    if estimate.method == "exact":
        return "by definition"
    if estimate.low is None:
        return ""
    return f"{bare_number(estimate.low, unit)} to {bare_number(estimate.high, unit)}"


def change(value: float, unit: Unit) -> str:
    """A difference with its sign; shares differ in points."""
    sign = "+" if value > 0 else ""
    if unit == "share":
        return f"{sign}{_plain(100 * value, 1)}{NBSP}points"
    return f"{sign}{number(value, unit)}"


def outcome_of(estimate: Estimate) -> Outcome:
    """What the interval of a difference allows to say, where higher is better."""
    if estimate.low is not None and estimate.low > 0:
        return "better"
    if estimate.high is not None and estimate.high < 0:
        return "worse"
    return "open"


def findings(difference: Difference, stages: Mapping[str, Mapping[str, Estimate]]) -> list[Finding]:
    """The verdict on one stage, one line a headline figure. A figure that holds by definition proves nothing."""
    found: list[Finding] = []
    for key in HEADLINE:
        after, before = stages[difference.stage][key], stages[difference.against][key]
        delta = difference.figures[key]
        if delta.value is None or after.method == "exact":
            continue
        figure, outcome = FIGURE[key], outcome_of(delta)
        rows = "pairs" if key.startswith("preference") else "prompts"
        found.append(
            Finding(
                key=key,
                outcome=outcome,
                title=figure.title,
                before=number(before.value, figure.unit),
                after=number(after.value, figure.unit),
                change=change(delta.value, figure.unit),
                spread="" if delta.low is None else _signed_interval(delta, figure),
                conclusion=f"no difference that {delta.num} {rows} can show" if outcome == "open" else outcome,
            )
        )
    return found


def headline(difference: Difference, found: Sequence[Finding]) -> str:
    """One sentence on a stage: what got better, what got worse, what stayed open."""
    parts: list[str] = []
    for outcome, words in (("better", "better in"), ("worse", "worse in"), ("open", "no shown difference in")):
        named = [_named(difference, finding) for finding in found if finding.outcome == outcome]
        if named:
            parts.append(f"{words} {_joined(named)}")
    if not parts:
        return f"{difference.stage} against {difference.against}: nothing could be compared."
    return f"{difference.stage} against {difference.against}: {'; '.join(parts)}."


def _named(difference: Difference, finding: Finding) -> str:
    titles = {
        "exact_accuracy": "exact answers",
        "style_share": "the preferred style",
        "preference_accuracy": "ranking held-out pairs",
        "preference_accuracy_wrong_answer": "ranking right over wrong answers",
    }
    delta = difference.figures[finding.key]
    assert delta.value is not None
    return f"{titles[finding.key]} ({change(delta.value, FIGURE[finding.key].unit)})"


def _joined(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _signed_interval(estimate: Estimate, figure: Figure) -> str:
    ends = (estimate.low, estimate.high)
    low, high = (f"{'+' if end and end > 0 else ''}{bare_number(end, figure.unit)}" for end in ends)
    return f"{low} to {high}"


def _plain(value: float, digits: int) -> str:
    """With a real minus sign, and no minus on a zero."""
    text = f"{value:.{digits}f}"
    if float(text) == 0:
        text = text.removeprefix("-")
    return text.replace("-", "−")
