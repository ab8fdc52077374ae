"""A proof: one claim about the numbers, what was found, and what was allowed.

In: two results that should agree. Out: a record with a verdict. Must not know: which claims there are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Verdict = Literal["passed", "FAILED", "skipped"]
Gradients = Mapping[str, Tensor]

SUMS = 1e-5
"""Relative difference allowed between two ways of summing the same float32 numbers: about a hundred roundings."""


@dataclass(frozen=True, slots=True)
class Proof:
    """One claim. `error` is None where it could not be tried here; `reason` says why, or how it broke off."""

    name: str
    compared: str
    error: float | None
    limit: float
    reason: str = ""

    @property
    def verdict(self) -> Verdict:
        """A figure that is not a number has failed."""
        if self.error is None:
            return "skipped"
        return "passed" if self.error <= self.limit else "FAILED"


def skipped(name: str, reason: str) -> Proof:
    """A claim that cannot be tried on this machine."""
    return Proof(name, "", None, 0.0, reason)


def broken(name: str, error: Exception) -> Proof:
    """A claim whose trial ended in an error, which is as bad as a wrong number."""
    text = " ".join(str(error).split())[:200]
    return Proof(name, "", math.inf, 0.0, f"{type(error).__name__}: {text}")


def relative(found: float, expected: float) -> float:
    """Difference of two numbers over the expected one, or over 1 where that is smaller."""
    return abs(found - expected) / max(1.0, abs(expected))


def worst_value(found_N: Tensor, expected_N: Tensor) -> float:
    """Largest difference over the largest expected value; infinite where the shapes differ."""
    if found_N.shape != expected_N.shape:
        return math.inf
    expected_N = expected_N.detach().cpu().double()
    return float((found_N.detach().cpu().double() - expected_N).abs().max() / expected_N.abs().max())


def worst_gradient(found: Gradients, expected: Gradients) -> float:
    """Largest over the weights of the difference's norm over the gradient's own.

    A gradient below 1e-4 of the largest one is measured by that: a bias in front of a softmax has a gradient of 0,
    and what stands there is rounding. Infinite where other weights have gradients, or none has.
    """
    norms = {name: float(gradient.double().norm()) for name, gradient in expected.items()}
    floor = 1e-4 * max(norms.values(), default=0.0)
    if found.keys() != expected.keys() or not floor > 0:
        return math.inf
    errors = [
        float((found[name].cpu().double() - gradient.cpu().double()).norm()) / max(norms[name], floor)
        for name, gradient in expected.items()
    ]
    return math.nan if any(math.isnan(error) for error in errors) else max(errors)


def take_gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """The gradients of the weights, by name; the model has none afterwards."""
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad(set_to_none=True)
    return found
