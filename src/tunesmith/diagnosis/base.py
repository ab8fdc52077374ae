"""What a diagnosis is made of and from: a stage's records column by column, its settings, the finding.

In: records of steps and evaluations, a recipe's stage. Out: frozen findings. Must not know: models, tensors, what is
done about a finding.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from tunesmith.recipe.preferences import PairedStage, PreferenceStage
from tunesmith.recipe.stages import StageBase
from tunesmith.recipe.tuning import Lora
from tunesmith.runs.records import Value

WINDOW = 20
"""Steps whose mean says where a curve is: enough that one hard row does not decide."""
SAME_NATS = 1e-4
"""Equal answers in one pair differ by float32's rounding only."""

Severity = Literal["notice", "problem"]
"""notice: worth knowing, and nothing is lost by going on; problem: the result gets worse, or nothing is learned."""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """One finding. `step`: the last one that it was seen at; `evidence`: the numbers, in words; `figures`: the same for
    programs; `told_by`: kinds of warnings of the watch that have said it already."""

    name: str
    severity: Severity
    step: int
    evidence: str
    cause: str
    remedy: str
    figures: Mapping[str, float] = field(default_factory=dict)
    told_by: tuple[str, ...] = ()


class Table:
    """Records column by column, in the order of their steps; nan where a record has no number."""

    def __init__(self, records: Sequence[Mapping[str, Value]] = ()) -> None:
        self.steps: list[int] = []
        self._columns: dict[str, array[float]] = {}
        for record in records:
            self.add(record)

    def add(self, record: Mapping[str, Value]) -> None:
        """One more record; it must have a `step`."""
        step = record["step"]
        assert isinstance(step, int)
        for name, value in record.items():
            if isinstance(value, int | float) and name not in self._columns:
                self._columns[name] = array("d", [math.nan] * len(self.steps))
        self.steps.append(step)
        for name, column in self._columns.items():
            value = record.get(name)
            column.append(float(value) if isinstance(value, int | float) else math.nan)

    def __len__(self) -> int:
        return len(self.steps)

    def has(self, key: str) -> bool:
        """Whether any record has a number under `key`."""
        return key in self._columns

    def column(self, key: str, start: int = 0, stop: int | None = None) -> list[float]:
        """The numbers of the records from `start` to before `stop`, as slices count, nan where one has none."""
        if key not in self._columns:
            return [math.nan] * len(self.steps[start:stop])
        return list(self._columns[key][start:stop])

    def mean(self, key: str, num: int = WINDOW, *, until: int | None = None) -> float:
        """Mean of the last `num` records, or of the last up to step `until`; nan where they hold no number."""
        stop = len(self.steps) if until is None else bisect_right(self.steps, until)
        return mean(self.column(key, max(0, stop - num), stop))

    def known(self, key: str) -> list[tuple[int, float]]:
        """(step, value) of every record that has a number."""
        return [(step, value) for step, value in zip(self.steps, self.column(key), strict=True) if math.isfinite(value)]


def mean(values: Sequence[float]) -> float:
    """Mean of those that are finite; nan where none is."""
    finite = [value for value in values if math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else math.nan


@dataclass(slots=True)
class Curves:
    """A stage's records so far. `warnings`: kinds that the watch has said; `is_over`: no step follows."""

    metrics: Table = field(default_factory=Table)
    evaluations: Table = field(default_factory=Table)
    warnings: dict[str, int] = field(default_factory=dict)
    is_over: bool = False

    @property
    def step(self) -> int:
        """The newest step that there is a record of."""
        return max((table.steps[-1] for table in (self.metrics, self.evaluations) if table.steps), default=0)


def same_answers(curves: Curves, num: int) -> bool:
    """Whether both answers of every pair had the same tokens and log-probs in the last `num` steps."""
    table = curves.metrics
    keys = [(f"{kind}_chosen", f"{kind}_rejected") for kind in ("logprob", "tokens")]
    if not len(table) or not all(table.has(key) for pair in keys for key in pair):
        return False
    sides = [[table.column(key)[-num:] for key in pair] for pair in keys]
    return all(abs(one - other) < SAME_NATS for pair in sides for one, other in zip(*pair, strict=True))


@dataclass(frozen=True, slots=True)
class Settings:
    """What of a stage's recipe a diagnosis goes by, and a remedy names; None for a key that the stage has not."""

    method: str
    learning_rate: float
    is_preference: bool = False
    makes_policy: bool = True
    beta: float | None = None
    sft_weight: float | None = None
    kl_budget: float | None = None
    max_grad_norm: float = 1.0
    epochs: int = 1
    keeps_best: bool = False
    has_dropout: bool = False

    @classmethod
    def of(cls, stage: StageBase) -> Settings:
        """The settings of a recipe's stage."""
        beta = stage.model_dump(include={"beta"}).get("beta")
        return cls(
            method=stage.method,
            learning_rate=stage.learning_rate,
            is_preference=isinstance(stage, PreferenceStage),
            makes_policy=stage.makes_policy,
            beta=beta if isinstance(beta, float) else None,
            sft_weight=stage.sft_weight if isinstance(stage, PairedStage) else None,
            kl_budget=stage.kl_budget if isinstance(stage, PreferenceStage) else None,
            max_grad_norm=stage.max_grad_norm,
            epochs=stage.epochs,
            keeps_best=stage.keep == "best",
            has_dropout=isinstance(stage.tuning, Lora) and stage.tuning.dropout > 0,
        )

    def hold_closer(self) -> str:
        """The keys that keep the policy nearer to where it started, with values."""
        beta = f"`beta: {rounded(2 * self.beta)}` (now {self.beta:g}) or " if self.beta else ""
        return f"{beta}`learning_rate: {rounded(self.learning_rate / 2)}` (now {self.learning_rate:g})"


def rounded(value: float) -> str:
    """Two digits: a remedy is a proposal."""
    return f"{value:.2g}"


Look = Callable[[Curves, Settings], Diagnosis | None]
"""A diagnosis: a pure function of the records and settings; None where they do not show it."""
