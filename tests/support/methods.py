"""Methods as their tests see them: settings, and a slow float64 loss that was written from the paper alone.

`tests/parity/losses/*.py` hold the slow losses and the cases, one file a family; `all_cases` gathers them, and the
tests of `tests/parity/test_methods.py` and the golden curves run over every one.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from tests.support.training import answer_trees, labeled_trees, pair_trees, ranked_trees, text_trees
from tunesmith.data.ending import at_end
from tunesmith.data.types import Tree
from tunesmith.engine.logprobs import Logprobs
from tunesmith.objectives import Carried, Objective, objective_of
from tunesmith.recipe.stages import RowKind, StageBase
from tunesmith.train.figures import with_figures
from tunesmith.train.step import num_read


@dataclass(frozen=True, eq=False)
class Answer:
    """One answer, token by token, [L] each in float64: under the policy, under the reference, and what else a token has
    (mean log-prob over the vocabulary, log of the collision probability), and its weight."""

    policy: Tensor
    reference: Tensor
    mean: Tensor
    collision: Tensor
    weights: Tensor


@dataclass(frozen=True, eq=False)
class Example:
    """One row: its answers in order, and what it says of them."""

    answers: list[Answer]
    scores: tuple[float, ...] = ()
    label: bool | None = None
    weight: float = 1.0


SlowLoss = Callable[[Sequence[Example]], Tensor]
"""The mean loss of a step of examples, a float64 scalar, written from the paper: no shared code, no batching."""


@dataclass(frozen=True)
class Case:
    """A method under some settings. `name` is the method's, with what is set after it.

    slow: the loss of the papers. carried: what the method has from earlier steps, where it has any; `slow` must be of
    the same. golden: it has a curve of 50 steps in tests/golden. start: the loss where the policy is its reference, on
    any rows; None where it depends on them. is_slope: its gradient is the derivative of its value; not so where parts
    of the loss are held constant (a weight, a baseline), which finite differences would move.
    """

    name: str
    stage: StageBase
    slow: SlowLoss
    start: float | None = None
    carried: Mapping[str, float] = field(default_factory=dict)
    golden: bool = True
    is_slope: bool = True

    @property
    def objective(self) -> Objective:
        """The method, as it is while it carries `carried`."""
        objective = objective_of(self.stage)
        return objective.bound(Carried(dict(self.carried))) if self.carried else objective


def all_cases() -> dict[str, Case]:
    """Every case of `tests/parity/losses`, by name."""
    import tests.parity.losses as folder

    found: dict[str, Case] = {}
    for module in pkgutil.iter_modules(folder.__path__):
        for case in importlib.import_module(f"tests.parity.losses.{module.name}").CASES:
            assert case.name not in found, case.name
            found[case.name] = case
    return found


def trees_for(stage: StageBase, count: int = 8) -> list[Tree]:
    """Trees such as the stage trains on; every row has a weight and scores of its own where that fits."""
    makers: dict[RowKind, Callable[[int], list[Tree]]] = {
        "answers": answer_trees,
        "text": text_trees,
        "pairs": pair_trees,
        "labels": labeled_trees,
        "rankings": ranked_trees,
    }
    trees = makers[stage.rows](count)
    if not stage.makes_policy:
        trees = [at_end(tree) for tree in trees]
    if stage.rows == "pairs":
        return [
            replace(tree, scores=(3.0 + number % 3, 2.5 - number % 2), weight=0.5 + number % 4)
            for number, tree in enumerate(trees)
        ]
    return trees


def random_logprobs(trees: Sequence[Tree], *, seed: int = 0) -> Logprobs:
    """What an objective sees of the trees, in float64: random, with gradient, every extra supplied."""
    draw = np.random.default_rng(seed)
    lengths_B = [length for tree in trees for length in num_read(tree)]
    size = sum(lengths_B)

    def values(scale: float, shift: float) -> Tensor:
        return torch.from_numpy(-scale * draw.random(size) - shift)

    branch_N = torch.from_numpy(np.repeat(np.arange(len(lengths_B)), lengths_B))
    tree_B = torch.from_numpy(np.repeat(np.arange(len(trees)), [len(tree.branches) for tree in trees]))
    policy_N, reference_N = values(2.0, 0.01), values(2.0, 0.01)
    extras = {"mean": values(1.0, 3.0).requires_grad_(), "collision": values(2.0, 0.1)}
    return with_figures(Logprobs(policy_N.requires_grad_(), branch_N, tree_B, reference_N, extras), trees)


def seen_by(logprobs: Logprobs, objective: Objective) -> Logprobs:
    """The same with only what the loop would supply."""
    extras = {name: logprobs.extras[name] for name in objective.wants}
    reference_N = logprobs.reference_N if objective.needs_reference else None
    return replace(logprobs, extras=extras, reference_N=reference_N)


def examples_of(logprobs: Logprobs, trees: Sequence[Tree]) -> list[Example]:
    """The same numbers, row by row and answer by answer, still part of the graph."""
    examples, branch = [], 0
    for tree in trees:
        answers = []
        for own in tree.branches:
            here = logprobs.branch_N == branch
            assert logprobs.reference_N is not None
            unread = 1 if len(tree.prompt_ids) == 0 else 0
            given = own.trained.astype(np.float64) if own.weights is None else own.weights.astype(np.float64)
            weights = torch.from_numpy(given[unread:][own.trained[unread:]])
            extras = [logprobs.extras[name][here] for name in ("mean", "collision")]
            answers.append(Answer(logprobs.logprob_N[here], logprobs.reference_N[here], *extras, weights))
            branch += 1
        examples.append(Example(answers, tree.scores, tree.label, tree.weight))
    return examples
