"""Proofs about attention: every backend that runs here gives what the model's own attention gives, and leaks nothing.

In: a device and the type that it computes in. Out: proofs. Must not know: how backends compute, objectives, files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tunesmith.data.types import Branch, Tree
from tunesmith.engine.backends import usable
from tunesmith.engine.engine import Backend, Engine
from tunesmith.engine.parity import LEAK_TOLERANCE, TOLERANCE
from tunesmith.engine.plain import plain_logprobs
from tunesmith.selftest.inputs import FAMILIES, VOCABULARY, mixed_trees, small_model
from tunesmith.selftest.proof import SUMS, Gradients, Proof, skipped, take_gradients, worst_gradient, worst_value


def name_of(dtype: torch.dtype) -> str:
    """`float32`, `bfloat16`, `float16`."""
    return str(dtype).removeprefix("torch.")


def attention_proofs(device: torch.device, dtype: torch.dtype) -> Iterator[Proof]:
    """Every backend, on every family of models, in float32 and in the device's own type."""
    for kind, family in product(dict.fromkeys((torch.float32, dtype)), FAMILIES):
        model = small_model(family, device, kind)
        trained = usable(model)
        reading = dict(usable(model.requires_grad_(False)))  # FlexAttention has no backward on a CPU
        for backend, reason in trained:
            name = f"{backend}, {family}, {name_of(kind)}"
            if reading[backend]:
                yield skipped(name, reading[backend])
            else:
                yield from _proofs(name, model.requires_grad_(not reason), backend, reason)


def _proofs(name: str, model: PreTrainedModel, backend: Backend, no_gradient: str) -> Iterator[Proof]:
    trees = mixed_trees()
    limit = SUMS if model.dtype == torch.float32 else TOLERANCE[model.dtype]
    compared = "against transformers' own attention, one branch at a time"
    plain_N, expected = values_and_gradients(model, "plain", trees)
    found_N, found = values_and_gradients(model, backend, trees)
    yield Proof(f"{name}: log-probs", compared, worst_value(found_N, plain_N), limit)
    if no_gradient:
        yield skipped(f"{name}: gradient", no_gradient)
    else:
        yield Proof(f"{name}: gradient", compared, worst_gradient(found, expected), limit)
    leak = largest_leak(model, backend, trees)
    yield Proof(f"{name}: leak", "others' log-probs when a tree, or a branch, changes", leak, LEAK_TOLERANCE)


def values_and_gradients(model: PreTrainedModel, backend: Backend, trees: Sequence[Tree]) -> tuple[Tensor, Gradients]:
    """Log-probs, and the gradient of a sum of them in which each has a weight of its own; of a frozen model none."""
    if backend == "plain":
        logprob_N = plain_logprobs(model, trees).logprob_N
    else:
        logprob_N = Engine(model, backend).logprobs(trees).logprob_N
    if logprob_N.requires_grad:
        (logprob_N * torch.linspace(-1, 2, len(logprob_N), device=logprob_N.device)).sum().backward()
    return logprob_N.detach(), take_gradients(model)


@torch.no_grad()
def largest_leak(model: PreTrainedModel, backend: Backend, trees: Sequence[Tree]) -> float:
    """Largest move of a log-prob that may not move, over the largest log-prob: of other trees when a tree's tokens
    change, of its other branches when one branch's do. Infinite where what was changed does not move itself.
    """
    engine = Engine(model, backend)
    before = engine.logprobs(trees)
    tree_N = before.tree_B[before.branch_N]
    worst = 0.0
    first = 0  # number of the tree's first branch
    for number, tree in enumerate(trees):
        trials = [(_changed(tree, range(len(tree.branches)), prompt=True), tree_N == number)]
        if len(tree.branches) > 1:
            for branch in (0, len(tree.branches) - 1):
                trials.append((_changed(tree, [branch], prompt=False), before.branch_N == first + branch))
        for changed, own_N in trials:
            after_N = engine.logprobs([*trees[:number], changed, *trees[number + 1 :]]).logprob_N
            moved_N = (after_N - before.logprob_N).abs()
            if not float(moved_N[own_N].max()) > 0:
                return float("inf")
            worst = max(worst, float(moved_N[~own_N].max()))
        first += len(tree.branches)
    return worst / float(before.logprob_N.abs().max())


def _changed(tree: Tree, branches: Sequence[int], *, prompt: bool) -> Tree:
    """The tree with other tokens in some branches, and in its prompt where wanted."""

    def shifted(ids: np.ndarray) -> np.ndarray:
        return ((ids + 1) % VOCABULARY).astype(np.int32)

    made = [
        Branch(shifted(branch.ids), branch.trained) if number in branches else branch
        for number, branch in enumerate(tree.branches)
    ]
    return replace(tree, prompt_ids=shifted(tree.prompt_ids) if prompt else tree.prompt_ids, branches=tuple(made))
