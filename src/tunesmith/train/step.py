"""One optimizer step's gradient, and its loss, from a set of trees.

In: an engine, the step's trees, an objective. Out: gradients on the weights; the loss and metrics as (sum, count).
Must not know: optimizers, files, recipes.

The count that divides is taken over the whole step before the first backward. Each rank knows every tree of the step
and computes its share; the log-probs of all trees meet in one vector, so that losses and metrics are those of the
whole step in the order of its trees, however it was split.

Where memory runs out on any rank, all of them drop what they have and raise MemoryFullError; the caller does the step
again in smaller forests. A tree whose branches are in different forests gets its loss as the methods do whose trees
depend on one another: every trained token's coefficient is fixed by a scoring pass without gradient.

Shapes: N trained tokens of the step (of a forest where it says so), B branches, E values of a token that the method
reads: its log-prob, and the extras that it wants.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.amp import GradScaler

from tunesmith.data.plan import deal
from tunesmith.data.types import Tree
from tunesmith.engine.engine import Engine
from tunesmith.engine.logprobs import Extra, Logprobs
from tunesmith.engine.retry import Budget, MemoryFullError, memory_problem
from tunesmith.errors import NumericsError
from tunesmith.model.machine import Machine
from tunesmith.objectives import Objective, Result, Sum
from tunesmith.train.figures import with_figures
from tunesmith.train.optim import fill_gradients

Array = npt.NDArray[np.float32]

_SHOWN_ROWS = 10
"""Row ids named in an error; the rest are counted."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """The trees of one step, or of one evaluation, with the reference's log-probs where the method needs them.

    references: per tree one float32 value a trained token, in branch and token order.
    """

    trees: Sequence[Tree]
    references: Sequence[Array] | None = None

    def part(self, indices: Sequence[int]) -> Batch:
        """Some of the trees."""
        references = None if self.references is None else [self.references[index] for index in indices]
        return Batch([self.trees[index] for index in indices], references)

    @property
    def num_tokens(self) -> int:
        """Tokens that a forward pass computes."""
        return sum(tree.num_tokens for tree in self.trees)

    def reference_N(self, device: torch.device) -> Tensor | None:
        """The references, end to end."""
        if self.references is None:
            return None
        joined = np.concatenate([*self.references, np.zeros(0, np.float32)])
        return torch.from_numpy(joined).to(device)


@dataclass(frozen=True, slots=True, eq=False)
class Micro:
    """One micro-batch of a step: its number in the step on this rank, its trees, and its trained tokens' places.

    split: the numbers, in the step, of trees that stand here with one branch only; empty where all trees are whole.
    """

    number: int
    batch: Batch
    places_N: Tensor
    split: tuple[int, ...] = ()


class LostNumberError(NumericsError):
    """Log-probs that are not finite. logprob_N: all of the step's; trees: the numbers of the trees that hold them."""

    def __init__(self, what: str, *, logprob_N: Tensor, trees: Sequence[int]) -> None:
        super().__init__(what)
        self.logprob_N = logprob_N
        self.trees = tuple(trees)


@dataclass(frozen=True, slots=True, eq=False)
class StepResult:
    """What a step computed; the gradients are on the weights. num_untouched: weights that this rank did not reach.

    logprob_N: of all trained tokens, in the order of the trees.
    """

    loss: Sum
    metrics: Mapping[str, Sum]
    num_tokens: int
    logprob_N: Tensor
    num_untouched: int

    @property
    def num_trained(self) -> int:
        """Trained tokens of the step."""
        return len(self.logprob_N)


def num_read(tree: Tree) -> list[int]:
    """Trained tokens of each branch that have a token before them: those that the engine returns log-probs of."""
    unread = 1 if len(tree.prompt_ids) == 0 else 0
    return [int(branch.trained[unread:].sum()) for branch in tree.branches]


def micro_batches(
    batch: Batch, forest_tokens: int, machine: Machine, *, tree_tokens: int | None = None
) -> Iterator[Micro]:
    """This rank's micro-batches, in a canonical order; trees above `tree_tokens` go branch by branch."""
    share = deal(batch.trees, machine.world_size)[machine.rank]
    lengths = [num_read(tree) for tree in batch.trees]
    starts = np.concatenate([[0], np.cumsum([sum(length) for length in lengths])])
    forests = Budget(forest_tokens, tree_tokens).plan([batch.trees[index] for index in share])
    for number, units in enumerate(forests):
        places = []
        for unit in units:
            index = share[unit.index]
            start, length = int(starts[index]), sum(lengths[index])
            if unit.branch is not None:
                start, length = start + sum(lengths[index][: unit.branch]), lengths[index][unit.branch]
            places.append(np.arange(start, start + length))
        indices = [share[unit.index] for unit in units]
        is_split = units[0].branch is not None
        part = Batch([unit.tree for unit in units]) if is_split else batch.part(indices)
        places_N = torch.from_numpy(np.concatenate(places)).to(machine.device)
        yield Micro(number, part, places_N, tuple(indices) if is_split else ())


def score(
    engine: Engine,
    batch: Batch,
    *,
    forest_tokens: int,
    machine: Machine,
    seed_key: str = "",
    tree_tokens: int | None = None,
    between: Callable[[], None] = lambda: None,
) -> Tensor:
    """Log-probs of all trained tokens [N], float32, in the order of the trees, on every rank, without gradient.

    `between` is called before each forest and may raise, to leave the work.
    Raises MemoryFullError, on every rank, where memory runs out on one.
    """
    return values(
        engine,
        batch,
        forest_tokens=forest_tokens,
        machine=machine,
        seed_key=seed_key,
        tree_tokens=tree_tokens,
        between=between,
    ).squeeze(-1)


def values(
    engine: Engine,
    batch: Batch,
    *,
    wants: Sequence[Extra] = (),
    forest_tokens: int,
    machine: Machine,
    seed_key: str = "",
    tree_tokens: int | None = None,
    between: Callable[[], None] = lambda: None,
) -> Tensor:
    """As `score`, with the wanted extras beside the log-probs, [N, E]."""
    micros = micro_batches(batch, forest_tokens, machine, tree_tokens=tree_tokens)
    size = _num_trained(batch)
    return _values(engine, micros, size, wants=wants, machine=machine, seed_key=seed_key, between=between)


def _values(
    engine: Engine,
    micros: Iterable[Micro],
    size: int,
    *,
    wants: Sequence[Extra],
    machine: Machine,
    seed_key: str,
    between: Callable[[], None] = lambda: None,
) -> Tensor:
    """Values of the micro-batches' tokens at their places in [N, E], zeros elsewhere, summed over the ranks."""
    value_NE = torch.zeros(size, 1 + len(wants), device=machine.device)

    def work() -> None:
        with torch.no_grad():
            for micro in micros:
                between()
                with machine.seeded(f"{seed_key}/{machine.rank}/{micro.number}"):
                    value_NE[micro.places_N] = engine.logprobs(micro.batch.trees, wants).stacked(wants)

    _together(machine, work)
    machine.all_sum(value_NE)
    return value_NE


def _together(machine: Machine, work: Callable[[], None]) -> None:
    """Run this rank's part; where memory ran out on any rank, raise MemoryFullError on all, so that none waits."""
    problem = memory_problem(work)
    if machine.largest(int(problem is not None)):
        raise MemoryFullError(problem or "on another rank")


def judge(batch: Batch, value_NE: Tensor, objective: Objective) -> Result:
    """The objective over all trees at once, from their tokens' values [N, E], in float64 on the CPU.

    Log-probs [N] alone will do for a method that wants nothing else.
    """
    value_NE = value_NE if value_NE.ndim == 2 else value_NE[:, None]
    return objective.function(_whole(batch, value_NE.detach().cpu().double(), objective))


def accumulate(
    engine: Engine,
    batch: Batch,
    *,
    objective: Objective,
    forest_tokens: int,
    machine: Machine,
    seed_key: str = "",
    tree_tokens: int | None = None,
    scaler: GradScaler | None = None,
    between: Callable[[], None] = lambda: None,
) -> StepResult:
    """Add the gradient of the step's mean loss to the weights, and return what was computed.

    `seed_key` names the step: dropout of a forest depends on it, the rank and the forest's number. With `scaler` the
    gradient is that of the loss times its scale. `between` is called before each forest and may raise, to leave the
    step; the weights' gradients are void then. Raises LostNumberError, naming rows, where a log-prob is not finite
    (the weights' gradients are then void), and MemoryFullError, on every rank and with no gradient left,
    where memory runs out on one.
    """
    count = sum(objective.units(tree) for tree in batch.trees)
    assert count > 0, "a step without a trained token"
    trained = [parameter for parameter in engine.model.parameters() if parameter.requires_grad]
    micros = list(micro_batches(batch, forest_tokens, machine, tree_tokens=tree_tokens))
    wants = objective.wants
    weight_NE = None
    if not objective.separable or Budget(forest_tokens, tree_tokens).splits(batch.trees):
        weight_NE = _fixed_coefficients(engine, batch, micros, objective, count, machine=machine, seed_key=seed_key)
    value_NE = torch.zeros(_num_trained(batch), 1 + len(wants), device=machine.device)
    untouched: list[int] = []

    def work() -> None:
        for micro in micros:
            between()
            with machine.seeded(f"{seed_key}/{machine.rank}/{micro.number}"):
                logprobs = engine.logprobs(micro.batch.trees, wants)
                value_NE[micro.places_N] = logprobs.stacked(wants).detach()
                loss = _loss_share(micro, logprobs, objective, count, weight_NE)
                (loss if scaler is None else scaler.scale(loss)).backward()
        untouched.append(fill_gradients(trained))

    try:
        _together(machine, work)
    except MemoryFullError:
        for parameter in trained:
            parameter.grad = None  # all of it is this step's
        raise
    machine.all_sum(value_NE)
    logprob_N = value_NE[:, 0]
    _refuse_non_finite(batch, logprob_N)
    machine.all_sum_many([parameter.grad for parameter in trained if parameter.grad is not None])
    result = judge(batch, value_NE, objective)
    assert math.isclose(result.loss.count, count, rel_tol=1e-6), "Objective.units disagrees with Objective.function"
    return StepResult(result.loss, result.metrics, batch.num_tokens, logprob_N, untouched[0])


def _fixed_coefficients(
    engine: Engine,
    batch: Batch,
    micros: Sequence[Micro],
    objective: Objective,
    count: float,
    *,
    machine: Machine,
    seed_key: str,
) -> Tensor:
    """Derivative of the step's mean loss by the values [N, E] of every tree here whose loss no single forest can tell.

    Those are all trees of a coupled method, and in any other the split ones of this rank; zero elsewhere. The scoring
    pass runs the step's own micro-batches, so that it sees the same dropout.
    """
    chosen = [micro for micro in micros if micro.split or not objective.separable]
    size = _num_trained(batch)
    value_NE = _values(engine, chosen, size, wants=objective.wants, machine=machine, seed_key=seed_key)
    if not objective.separable:
        return _coefficients(batch, value_NE, objective, count)
    split = sorted({index for micro in micros for index in micro.split})
    if not split:
        return torch.zeros_like(value_NE)
    lengths = [sum(num_read(tree)) for tree in batch.trees]
    parts = torch.split(value_NE, lengths)
    split_NE = torch.cat([parts[index] for index in split])
    found = torch.split(_coefficients(batch.part(split), split_NE, objective, count), [lengths[i] for i in split])
    weights = dict(zip(split, found, strict=True))
    return torch.cat([weights.get(index, torch.zeros_like(part)) for index, part in enumerate(parts)])


def _loss_share(
    micro: Micro, logprobs: Logprobs, objective: Objective, count: float, weight_NE: Tensor | None
) -> Tensor:
    """This micro-batch's part of the step's mean loss."""
    if weight_NE is not None and (micro.split or not objective.separable):
        return (logprobs.stacked(objective.wants) * weight_NE[micro.places_N]).sum()
    reference_N = micro.batch.reference_N(logprobs.logprob_N.device)
    if reference_N is not None:
        logprobs = logprobs.with_reference(reference_N)
    return objective.function(with_figures(logprobs, micro.batch.trees)).loss.total / count  # the one line that divides


def _coefficients(batch: Batch, value_NE: Tensor, objective: Objective, count: float) -> Tensor:
    """Derivative of the step's mean loss by each value, [N, E]: fixed before the first backward."""
    leaf_NE = value_NE.detach().cpu().double().requires_grad_()
    loss = objective.function(_whole(batch, leaf_NE, objective)).loss.total / count
    (weight_NE,) = torch.autograd.grad(loss, leaf_NE)
    return weight_NE.to(value_NE)


def _whole(batch: Batch, value_NE: Tensor, objective: Objective) -> Logprobs:
    """The values of all trees' tokens as an objective reads them."""
    lengths_B = [length for tree in batch.trees for length in num_read(tree)]
    branch_N = torch.from_numpy(np.repeat(np.arange(len(lengths_B)), lengths_B))
    tree_B = torch.from_numpy(np.repeat(np.arange(len(batch.trees)), [len(tree.branches) for tree in batch.trees]))
    reference_N = batch.reference_N(torch.device("cpu"))
    extras = {name: value_NE[:, number] for number, name in enumerate(objective.wants, start=1)}
    reference_N = None if reference_N is None else reference_N.to(value_NE.dtype)
    return with_figures(Logprobs(value_NE[:, 0], branch_N, tree_B, reference_N, extras), batch.trees)


def _num_trained(batch: Batch) -> int:
    return sum(sum(num_read(tree)) for tree in batch.trees)


def _refuse_non_finite(batch: Batch, logprob_N: Tensor) -> None:
    bad_N = ~torch.isfinite(logprob_N).cpu()
    if not bad_N.any():
        return
    parts = torch.split(bad_N, [sum(num_read(tree)) for tree in batch.trees])
    numbers = [number for number, bad in enumerate(parts) if bad.any()]
    what = f"log-probs that are not finite in {name_rows([batch.trees[number].id for number in numbers])}."
    raise LostNumberError(what, logprob_N=logprob_N, trees=numbers)


def name_rows(ids: Sequence[str]) -> str:
    """Row ids for a message."""
    more = f" and {len(ids) - _SHOWN_ROWS} more" if len(ids) > _SHOWN_ROWS else ""
    return ", ".join(ids[:_SHOWN_ROWS]) + more
