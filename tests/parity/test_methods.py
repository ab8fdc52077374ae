"""Every method against its paper: value, gradient, splits, finite differences, and that it is not another method."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tests.support.methods import Case, all_cases, examples_of, random_logprobs, seen_by, trees_for
from tests.support.training import (
    MACHINE,
    assert_gradients_equal,
    gradients_of,
    lora_engine,
    noisy_references,
)
from tunesmith.engine.logprobs import Logprobs
from tunesmith.objectives import METHODS
from tunesmith.train.evaluate import evaluate
from tunesmith.train.step import Batch, accumulate

CASES = all_cases()
ON_TOKENS = {name: case for name, case in CASES.items() if not case.objective.reads_score}
PLAIN = {name: case for name, case in CASES.items() if name == case.stage.method}
"""Each method once, under the settings that its case of its own name has."""


def value_and_gradients(case: Case, logprobs: Logprobs) -> tuple[Tensor, Tensor]:
    """Mean loss, and its derivative by every log-prob (and by the extras that carry gradient, where it wants them)."""
    seen = seen_by(logprobs, case.objective)
    result = case.objective.function(seen)
    loss = result.loss.total / result.loss.count
    return loss.detach(), _gradient(loss, logprobs)


def _gradient(loss: Tensor, logprobs: Logprobs) -> Tensor:
    leaves = (logprobs.logprob_N, logprobs.extras["mean"])
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return torch.cat(
        [torch.zeros_like(leaf) if each is None else each for leaf, each in zip(leaves, found, strict=True)]
    )


def test_every_method_has_a_case() -> None:
    assert set(PLAIN) == set(METHODS)


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_are_the_papers(name: str) -> None:
    case = CASES[name]
    for seed in range(3):
        trees = trees_for(case.stage)
        logprobs = random_logprobs(trees, seed=seed)
        found, gradient = value_and_gradients(case, logprobs)
        slow = case.slow(examples_of(logprobs, trees))
        assert_close(found, slow.detach(), rtol=1e-12, atol=1e-12)
        assert_close(gradient, _gradient(slow, logprobs), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", CASES)
def test_units_are_what_the_loss_divides_by(name: str) -> None:
    case = CASES[name]
    trees = trees_for(case.stage)
    result = case.objective.function(seen_by(random_logprobs(trees), case.objective))
    assert result.loss.count == pytest.approx(sum(case.objective.units(tree) for tree in trees))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.objective.needs_reference])
def test_the_loss_where_the_policy_is_its_reference(name: str) -> None:
    case = CASES[name]
    trees = trees_for(case.stage)
    logprobs = random_logprobs(trees)
    same = replace(seen_by(logprobs, case.objective), reference_N=logprobs.logprob_N.detach())
    result = case.objective.function(same)
    if case.start is not None:
        assert result.loss.mean() == pytest.approx(case.start, rel=1e-12, abs=1e-12)
    assert result.metrics["margin"].mean() == 0 if "margin" in result.metrics else True


def mean_loss(case: Case, batch: Batch) -> float:
    """The held-out loss of the same rows, which is computed without gradient and in float64 behind the model."""
    loss = evaluate(ENGINE, batch, objective=case.objective, forest_tokens=10_000, machine=MACHINE)["loss"]
    assert isinstance(loss, float)
    return loss


ENGINE = lora_engine(moved=True)
"""One model for all: nothing here changes its weights for good."""


def batch_of(case: Case) -> Batch:
    trees = trees_for(case.stage)
    return Batch(trees, noisy_references(trees) if case.objective.needs_reference else None)


def gradients(case: Case, batch: Batch, forest_tokens: int) -> dict[str, Tensor]:
    ENGINE.model.eval()
    accumulate(ENGINE, batch, objective=case.objective, forest_tokens=forest_tokens, machine=MACHINE)
    return gradients_of(ENGINE)


@pytest.mark.parametrize("name", ON_TOKENS)
def test_splits_do_not_change_the_gradient(name: str) -> None:
    case = CASES[name]
    batch = batch_of(case)
    whole = gradients(case, batch, 10_000)
    assert_gradients_equal(gradients(case, batch, 1), whole)
    assert_gradients_equal(gradients(case, batch, 90), whole)


@pytest.mark.parametrize("name", [name for name, case in ON_TOKENS.items() if case.is_slope])
def test_finite_differences(name: str) -> None:
    """The derivative of the held-out loss in five random directions of the weights is the step's gradient's."""
    case = CASES[name]
    batch = batch_of(case)
    found = gradients(case, batch, 10_000)
    weights = {key: p for key, p in ENGINE.model.named_parameters() if key in found}
    size = 1e-3 / max(1.0, *(float(gradient.norm()) for gradient in found.values())) ** 0.5
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        direction = {key: torch.randn(p.shape, generator=generator) for key, p in weights.items()}
        expected = sum(float((found[key] * step).double().sum()) for key, step in direction.items())
        losses = []
        for sign in (1, -2):
            with torch.no_grad():
                for key, parameter in weights.items():
                    parameter.add_(direction[key], alpha=sign * size)
            losses.append(mean_loss(case, batch))
        with torch.no_grad():
            for key, parameter in weights.items():
                parameter.add_(direction[key], alpha=size)
        slope = (losses[0] - losses[1]) / (2 * size)
        scale = sum(float(gradient.double().norm() ** 2) for gradient in found.values()) ** 0.5
        assert slope == pytest.approx(expected, rel=0.02, abs=0.02 * scale)


def directions(kind: str) -> dict[str, np.ndarray]:
    """Each method's gradient by the log-probs of the same rows, scaled to length 1."""
    found = {}
    for name, case in PLAIN.items():
        if case.stage.rows == kind:
            _, gradient = value_and_gradients(case, random_logprobs(trees_for(case.stage)))
            found[name] = (gradient / gradient.norm()).numpy()
    return found


@pytest.mark.parametrize("kind", ["pairs", "labels", "rankings", "answers"])
def test_no_method_is_another(kind: str) -> None:
    """TRAPS 48: a loss name that trains another loss. Directions differ, so no learning rate makes them equal."""
    for (one, first), (two, second) in combinations(directions(kind).items(), 2):
        if len(first) == len(second):
            assert np.abs(first - second).max() > 1e-3, f"{one} is {two}"
