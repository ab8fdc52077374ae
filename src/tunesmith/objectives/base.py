"""What an objective sees and returns: log-probs of trained tokens in, (sum, count) pairs out.

In: nothing. Out: the frozen records that objectives, the engine's callers and the loop share.
Must not know: models, files, recipes.

Shapes: N trained tokens, B branches (answers), P pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from tunesmith.data.types import Tree
from tunesmith.engine.logprobs import Logprobs


@dataclass(frozen=True, slots=True, eq=False)
class Sum:
    """A total and the number of things that it is the total of; the reader divides, once, at the end."""

    total: Tensor  # scalar, float32
    count: float

    def __add__(self, other: Sum) -> Sum:
        return Sum(self.total + other.total, self.count + other.count)

    def mean(self) -> float:
        """total / count; nan where nothing was counted."""
        return float(self.total) / self.count if self.count else float("nan")


@dataclass(frozen=True, slots=True, eq=False)
class Result:
    """An objective's loss (its total carries the gradient) and its metrics (detached)."""

    loss: Sum
    metrics: Mapping[str, Sum] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Objective:
    """A method: a pure function from log-probs to a loss, and what the loop must know about it.

    `units(tree)` is the tree's share of the count that the step's loss is divided by; it is known before
    any forward pass, so the count is taken over the whole step, all micro-batches and ranks, before the
    first backward. `separable`: the loss of a step is the sum of the losses of its trees, so one pass per
    forest is enough; where it is not, the loop scores the whole step first and backpropagates coefficients.
    """

    name: str
    function: Callable[[Logprobs], Result]
    units: Callable[[Tree], int]
    num_answers: int
    needs_reference: bool = False
    separable: bool = True
