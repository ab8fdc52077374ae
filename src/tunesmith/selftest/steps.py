"""Proofs about a step: its loss and gradient are those of the papers, and nothing but its examples decides them.

In: a device. Out: proofs. Must not know: how they are shown, files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tunesmith.data.types import Tree
from tunesmith.engine.engine import Engine
from tunesmith.model.machine import Machine
from tunesmith.objectives import Objective, dpo, supervised
from tunesmith.selftest import reference
from tunesmith.selftest.attention import values_and_gradients
from tunesmith.selftest.inputs import (
    adapted_model,
    answer_trees,
    foreign_references,
    mixed_trees,
    pair_trees,
    small_model,
    text_trees,
)
from tunesmith.selftest.proof import (
    SUMS,
    Gradients,
    Proof,
    relative,
    skipped,
    take_gradients,
    worst_gradient,
    worst_value,
)
from tunesmith.train.modes import Checkpointing, Dropout, training_mode
from tunesmith.train.step import Batch, accumulate, num_read

ONE_FOREST = 10_000
BUDGETS = (1, 60, 110)
"""Tokens a forest: every tree alone, and two to five forests a step."""
ORDER = [5, 2, 7, 0, 3, 6, 1, 4]
SPLIT = "loss and gradient of the whole step in one forest"
MEMORY_MODES: tuple[tuple[Checkpointing, bool], ...] = (
    ("selective", False),
    ("full", False),
    ("none", True),
    ("full", True),
)
"""What is recomputed, and whether what is kept waits in the host's memory."""
RECOMPUTED = 1e-6
"""Layers that are run again run the same kernels on the same numbers."""


@dataclass(frozen=True, slots=True)
class Case:
    """A step: its trees, its method, and the loss of the papers on the same weights."""

    name: str
    batch: Batch
    objective: Objective
    slow: Callable[[reference.Weights], Tensor]


def cases() -> list[Case]:
    """Every objective, on trees of very unequal lengths."""
    answers, texts, pairs = answer_trees(), text_trees(), pair_trees()
    foreign = foreign_references(pairs, [sum(num_read(tree)) for tree in pairs])
    batch = Batch(pairs, foreign)

    def slow_dpo(beta: float, smoothing: float) -> Callable[[reference.Weights], Tensor]:
        return lambda weights: reference.dpo(weights, pairs, foreign, beta, smoothing)

    return [
        Case("sft", Batch(answers), supervised("sft"), lambda weights: reference.nll(weights, answers)),
        Case("completion", Batch(texts), supervised("completion"), lambda weights: reference.nll(weights, texts)),
        Case("dpo", batch, dpo(0.1), slow_dpo(0.1, 0.0)),
        Case("dpo, smoothed", batch, dpo(0.3, 0.1), slow_dpo(0.3, 0.1)),
    ]


def step(
    model: PreTrainedModel,
    case: Case,
    device: torch.device,
    *,
    forest_tokens: int = ONE_FOREST,
    tree_tokens: int | None = None,
) -> tuple[float, Gradients]:
    """Loss and gradients of the case's step, as a run computes them; trees above `tree_tokens` branch by branch."""
    result = accumulate(
        Engine(model),
        case.batch,
        objective=case.objective,
        forest_tokens=forest_tokens,
        machine=Machine(device),
        seed_key="selftest",
        tree_tokens=tree_tokens,
    )
    return result.loss.mean(), take_gradients(model)


def objective_proofs(device: torch.device) -> Iterator[Proof]:
    """Each objective's loss and gradient against float64."""
    model = small_model("llama", device)
    weights = reference.float64_weights(model)
    for case in cases():
        slow = case.slow(weights)
        gradients = torch.autograd.grad(slow, list(weights.values()))
        expected = dict(zip(weights, gradients, strict=True))
        loss, found = step(model, case, device, forest_tokens=60)
        compared = "against the paper in float64, one sequence at a time"
        yield Proof(f"{case.name}: loss", compared, relative(loss, float(slow.detach())), SUMS)
        yield Proof(f"{case.name}: gradient", compared, worst_gradient(found, expected), SUMS)


def split_proofs(device: torch.device) -> Iterator[Proof]:
    """The same step in other forests, its trees in another order, and (as after an overflow) branch by branch."""
    model = small_model("llama", device)
    for case in cases():
        loss, expected = step(model, case, device)
        others = [step(model, case, device, forest_tokens=forest_tokens) for forest_tokens in BUDGETS]
        yield Proof(f"{case.name}: micro-batches", SPLIT, _worst(others, loss, expected), SUMS)
        shuffled = [replace(case, batch=case.batch.part(places)) for places in (ORDER, ORDER[::-1])]
        others = [step(model, other, device, forest_tokens=60) for other in shuffled]
        yield Proof(f"{case.name}: order", SPLIT, _worst(others, loss, expected), SUMS)
        if case.objective.num_answers > 1:
            others = [step(model, case, device, forest_tokens=60, tree_tokens=tokens) for tokens in (1, 20)]
            yield Proof(f"{case.name}: branches apart", SPLIT, _worst(others, loss, expected), SUMS)


def prefix_proofs(device: torch.device) -> Iterator[Proof]:
    """Answers that share their prompt's computation against every answer in a row of its own."""
    model = small_model("llama", device)
    trees = mixed_trees()
    alone = [Tree(tree.id, tree.prompt_ids, (branch,)) for tree in trees for branch in tree.branches]
    shared_N, shared = values_and_gradients(model, "sdpa", trees)
    alone_N, expected = values_and_gradients(model, "sdpa", alone)
    compared = "answers on a shared prompt against a row for each"
    yield Proof("prefix sharing: log-probs", compared, worst_value(shared_N, alone_N), SUMS)
    yield Proof("prefix sharing: gradient", compared, worst_gradient(shared, expected), SUMS)


def checkpointing_proofs(device: torch.device) -> Iterator[Proof]:
    """Activations that are computed again in the backward pass."""
    model = adapted_model(device)
    case = cases()[2]
    _, expected = _in_training(model, case, device)
    for kind, offload in MEMORY_MODES:
        name = f"checkpointing: {kind}{', offloaded' if offload else ''}"
        if offload and device.type == "cpu":
            yield skipped(name, "activations are in the host's memory anyway")
            continue
        _, found = _in_training(model, case, device, checkpointing=kind, offload=offload)
        yield Proof(name, "gradients against those of none", worst_gradient(found, expected), RECOMPUTED)


def repeat_proofs(device: torch.device) -> Iterator[Proof]:
    """The same step twice, dropout on: its draws are keyed, so it must not move by one bit."""
    name = "a step twice"
    if device.type != "cpu":
        yield skipped(name, "a card's kernels may sum in another order; bitwise equality is promised on the CPU")
        return
    model = adapted_model(device, dropout=0.1)
    first, again = (_in_training(model, cases()[2], device, dropout="adapter") for _ in range(2))
    same = first[1].keys() == again[1].keys()
    same = same and all(torch.equal(gradient, again[1][key]) for key, gradient in first[1].items())
    error = abs(first[0] - again[0]) if same else max(worst_gradient(again[1], first[1]), torch.finfo().tiny)
    yield Proof(name, "loss and gradients with dropout, bit for bit", error, 0.0)


def _in_training(
    model: PreTrainedModel,
    case: Case,
    device: torch.device,
    *,
    checkpointing: Checkpointing = "none",
    offload: bool = False,
    dropout: Dropout = "off",
) -> tuple[float, Gradients]:
    with training_mode(model, dropout=dropout, gradient_checkpointing=checkpointing, offload=offload):
        return step(model, case, device, forest_tokens=110)


def _worst(others: Sequence[tuple[float, Gradients]], loss: float, expected: Gradients) -> float:
    """The largest difference of a step's loss or gradients; not a number where one of them is none."""
    errors = [error for other, found in others for error in (relative(other, loss), worst_gradient(found, expected))]
    return float(torch.tensor(errors, dtype=torch.float64).max())
