"""What an objective sees and returns: log-probs of trained tokens in, (sum, count) pairs out.

In: nothing. Out: the frozen records that objectives, the engine's callers and the loop share.
Must not know: models, files, recipes.

Shapes: N trained tokens, B branches (answers), P pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from tunesmith.data.types import Tree
from tunesmith.engine.logprobs import Extra, Logprobs


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


@dataclass(frozen=True, slots=True, eq=False)
class Carried:
    """What a method carries from step to step beside the weights: numbers (the mean reward so far), and tensors where
    it needs them (a moving reference). A checkpoint keeps both."""

    numbers: Mapping[str, float] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Carrying:
    """How a method carries something, in pure functions.

    start: what it has before the first step, from the trained weights by name. bind: the method's function while it
    has that. advance: what it has after an update, from what it had, from the step's loss and metrics as `bind` made
    them, over all micro-batches and ranks, and from the new weights; it changes none of the tensors that it is given,
    and the names, shapes and types stay those of `start`.
    """

    start: Callable[[Mapping[str, Tensor]], Carried]
    bind: Callable[[Carried], Callable[[Logprobs], Result]]
    advance: Callable[[Carried, Result, Mapping[str, Tensor]], Carried]


@dataclass(frozen=True, slots=True)
class Objective:
    """A method: a pure function from log-probs to a loss, and what the loop must know about it.

    `units(tree)` is the tree's share of the count that the step's loss is divided by; it is known before
    any forward pass, so the count is taken over the whole step, all micro-batches and ranks, before the
    first backward. `separable`: the loss of a step is the sum of the losses of its trees, so one pass per
    forest is enough; where it is not, the loop scores the whole step first and backpropagates coefficients.
    `carrying`: for methods that have a state of their own; `function` is then the one of the stage's start.
    `wants`: what else of the tokens' distributions it reads. `moves_reference`: what is carried are the weights of a
    live reference, which is scored anew in every step. `reads_score`: its log-probs are the scores of a reward head,
    one a branch. `evaluated`: what an evaluation computes in place of `function`: the same loss, with figures that only
    many examples can tell.
    """

    name: str
    function: Callable[[Logprobs], Result]
    units: Callable[[Tree], float]
    num_answers: int
    needs_reference: bool = False
    separable: bool = True
    carrying: Carrying | None = None
    wants: tuple[Extra, ...] = ()
    moves_reference: bool = False
    reads_score: bool = False
    evaluated: Callable[[Logprobs], Result] | None = None

    def start(self, weights: Mapping[str, Tensor]) -> Carried:
        """What the method has before the first step; nothing for most."""
        return Carried() if self.carrying is None else self.carrying.start(weights)

    def bound(self, carried: Carried) -> Objective:
        """The objective as it is while it has `carried`."""
        return self if self.carrying is None else replace(self, function=self.carrying.bind(carried))

    def advance(self, carried: Carried, result: Result, weights: Mapping[str, Tensor]) -> Carried:
        """What the method has after an update."""
        return carried if self.carrying is None else self.carrying.advance(carried, result, weights)

    def for_evaluation(self) -> Objective:
        """The objective as an evaluation computes it."""
        return self if self.evaluated is None else replace(self, function=self.evaluated)
