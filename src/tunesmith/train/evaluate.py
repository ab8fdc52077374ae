"""Evaluation on held-out trees: the same figures whatever the batch, the split and the number of ranks.

In: an engine, trees, an objective. Out: loss and metrics, each total / count over all trees, in float64.
Must not know: the loop, files, recipes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from tunesmith.engine.engine import Engine
from tunesmith.errors import NumericsError
from tunesmith.model.machine import Machine
from tunesmith.objectives import Objective, Result
from tunesmith.runs.records import Record
from tunesmith.train.modes import eval_mode
from tunesmith.train.step import Batch, judge, num_read, values

_TOLERANCE = 1e-5
"""Nats by which the start may differ from its own reference in float32 (rounding between packings is about 1e-6)."""

_NOISE_FACTOR = 5.0
"""A difference is refused above this many times what another packing of the same rows makes."""


def evaluate(
    engine: Engine,
    batch: Batch,
    *,
    objective: Objective,
    forest_tokens: int,
    machine: Machine,
    tree_tokens: int | None = None,
    between: Callable[[], None] = lambda: None,
) -> Record:
    """num_examples, num_trained, loss and the objective's metrics; dropout off, modes restored.

    `between` is called before each forest and may raise. Raises MemoryFullError where memory runs out.
    """
    with eval_mode(engine.model):
        value_NE = values(
            engine,
            batch,
            wants=objective.wants,
            forest_tokens=forest_tokens,
            machine=machine,
            tree_tokens=tree_tokens,
            between=between,
        )
    result = judge(batch, value_NE, objective.for_evaluation())
    means: Record = {name: value.mean() for name, value in result.metrics.items()}
    return {"num_examples": len(batch.trees), "num_trained": len(value_NE), "loss": result.loss.mean(), **means}


def check_reference(
    engine: Engine,
    batch: Batch,
    *,
    objective: Objective,
    forest_tokens: int,
    machine: Machine,
    tree_tokens: int | None = None,
) -> tuple[float, float]:
    """At the start the policy is its own reference: returns the loss there, and the loss that this implies (ln 2).

    Raises NumericsError where they differ by more than 1e-5, or, where the forward pass is coarser than float32,
    by more than packing the same rows otherwise does: then the reference is of another model, or dropout is on.
    Raises MemoryFullError where memory runs out.
    """
    with eval_mode(engine.model):
        read = partial(values, engine, batch, wants=objective.wants, machine=machine, tree_tokens=tree_tokens)
        value_NE = read(forest_tokens=forest_tokens)
        reference_N = batch.reference_N(machine.device)
        assert reference_N is not None
        found, expected = judge(batch, value_NE, objective), judge(batch, _put(value_NE, reference_N), objective)
        difference = _difference(found, expected)
        if difference <= _TOLERANCE:
            return found.loss.mean(), expected.loss.mean()
        alone_NE = read(forest_tokens=1)
    lengths = [sum(num_read(tree)) for tree in batch.trees]
    again = Batch(batch.trees, [part.cpu().numpy() for part in torch.split(value_NE[:, 0], lengths)])
    noise = _difference(judge(again, alone_NE, objective), judge(again, value_NE, objective))
    if not difference <= _NOISE_FACTOR * noise:  # also where it is nan
        value, wanted = found.loss.mean(), expected.loss.mean()
        raise NumericsError(
            f"the loss before the first update is {value:.7f}, not {wanted:.7f} (ln 2 = {math.log(2):.7f} for DPO): "
            "the reference is not the policy at the stage's start.",
            where="step 0",
            remedy="Delete the reference cache and run again; if it stays, please report it.",
        )
    return found.loss.mean(), expected.loss.mean()


def _put(value_NE: Tensor, logprob_N: Tensor) -> Tensor:
    """The same values with other log-probs; extras are the policy's own."""
    return torch.cat([logprob_N[:, None], value_NE[:, 1:]], -1)


def _difference(found: Result, expected: Result) -> float:
    """How far the loss, and the margin where there is one, are apart."""
    pairs = [(found.loss, expected.loss)]
    if "margin" in found.metrics:
        pairs.append((found.metrics["margin"], expected.metrics["margin"]))
    return max(abs(one.mean() - other.mean()) for one, other in pairs)
