"""Diagnoses of a stage while it trains: its records so far, and when they are looked at.

In: the records of steps and evaluations. Out: findings. Must not know: how a curve is judged, what follows from it.

What is found is a function of the records alone, and looked for at the same steps always, so a resumed stage finds what
an unbroken one does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tunesmith.diagnosis.base import Curves, Diagnosis, Settings
from tunesmith.diagnosis.diagnose import diagnose
from tunesmith.recipe.stages import StageBase
from tunesmith.runs.records import Value

LOOK_EVERY = 10
"""Steps between looks, beside one after each evaluation and at the end."""


@dataclass(slots=True)
class Diagnosing:
    """One stage's records and what they show. `problem`: the first problem of the last look."""

    settings: Settings
    curves: Curves = field(default_factory=Curves)
    problem: Diagnosis | None = None

    @classmethod
    def of(cls, stage: StageBase) -> Diagnosing:
        """Of a recipe's stage, before its first record."""
        return cls(Settings.of(stage))

    def stepped(self, record: Mapping[str, Value], *, is_last: bool) -> list[Diagnosis]:
        """Take a step's record; what is found, where it is time to look."""
        self.curves.metrics.add(record)
        self.curves.is_over = is_last
        return self.look() if is_last or self.curves.metrics.steps[-1] % LOOK_EVERY == 0 else []

    def evaluated(self, record: Mapping[str, Value]) -> list[Diagnosis]:
        """Take an evaluation's record, and look."""
        self.curves.evaluations.add(record)
        return self.look()

    def look(self) -> list[Diagnosis]:
        """What the records show now."""
        found = diagnose(self.curves, self.settings)
        self.problem = next((each for each in found if each.severity == "problem"), None)
        return found

    def resume(self, *, is_last: bool) -> None:
        """Look again where an unbroken stage has looked behind its newest step."""
        self.curves.is_over = is_last
        steps, evaluated = self.curves.metrics.steps, self.curves.evaluations.steps
        if steps and (is_last or steps[-1] % LOOK_EVERY == 0 or evaluated[-1:] == steps[-1:]):
            self.look()
