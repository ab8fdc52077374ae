"""Log-odds near probabilities of 0 and 1 (TRAPS 50), and exponentials that do not overflow."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, tensor
from torch.testing import assert_close

from tunesmith.objectives.log_odds import EXPONENT_CAP, capped_expm1, log1mexp, log_odds
from tunesmith.objectives.orpo import orpo_loss

LOGPROBS = [-1e-9, -1e-8, -1e-6, -1e-4, -1e-2, -0.1, -0.6, -0.6931471, -0.6931473, -0.8, -1.0, -5.0, -20.0, -50.0]


def exact(x: float) -> float:
    """log(p / (1 - p)) in Python's doubles, by the form that is exact at this size."""
    return x - (math.log(-math.expm1(x)) if x > -0.5 else math.log1p(-math.exp(x)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_log_odds_and_their_slopes_are_those_of_float64(dtype: torch.dtype) -> None:
    x = tensor(LOGPROBS, dtype=dtype)
    x = x[x != 0]  # float16 has no -1e-9; the next test is about 0
    x.requires_grad_()
    found = log_odds(x)
    expected = [exact(value) for value in x.detach().tolist()]
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for one, other in zip(found.tolist(), expected, strict=True):
        assert abs(one - other) <= 1e-6 * max(1.0, abs(other))
    (slope,) = torch.autograd.grad(found.sum(), x)
    slopes = tensor([-1 / math.expm1(value) for value in x.detach().tolist()])  # 1 / (1 - p)
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    representable = slopes < 6e4 if dtype == torch.float16 else slopes > 0  # float16 ends at 65504
    assert_close(slope.float()[representable], slopes[representable], rtol=tolerance, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_probability_of_exactly_1_has_large_and_finite_odds(dtype: torch.dtype) -> None:
    x = tensor([0.0, -0.0, -1e-9], dtype=dtype, requires_grad=True)
    found = log_odds(x)
    assert_close(found[0], tensor(12 * math.log(10)), rtol=1e-4, atol=0)  # p = 1 - 1e-12
    (slope,) = torch.autograd.grad(found.sum(), x)
    assert found.isfinite().all() and slope.float()[:2].tolist() == [0.0, 0.0]


def test_log1mexp_by_hand() -> None:
    assert_close(log1mexp(tensor([math.log(0.25), math.log(0.5)])), tensor([math.log(0.75), math.log(0.5)]))
    assert_close(log_odds(tensor([math.log(0.25), math.log(0.8)])), tensor([-math.log(3), math.log(4)]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_orpo_is_finite_and_exact_at_all_pairs_of_probabilities(dtype: torch.dtype) -> None:
    grid = tensor(LOGPROBS, dtype=dtype)
    chosen, rejected = (part.flatten().clone() for part in torch.meshgrid(grid, grid, indexing="ij"))

    def values(kind: torch.dtype) -> tuple[Tensor, Tensor]:
        pair = (chosen.to(kind).requires_grad_(), rejected.to(kind).requires_grad_())
        loss = orpo_loss(*pair, beta=0.3)
        return loss.detach().double(), torch.cat(torch.autograd.grad(loss.sum(), pair)).double()

    (loss, slope), (loss64, slope64) = values(torch.float32), values(torch.float64)
    assert loss.isfinite().all() and slope.isfinite().all()
    assert_close(loss, loss64, rtol=1e-6, atol=1e-6)
    assert_close(slope, slope64, rtol=2e-5, atol=1e-6)  # a slope is an exponential of log-odds up to 70 nats apart
    narrow, grad = values(dtype)
    assert narrow.isfinite().all()
    assert_close(narrow, loss64, rtol=1e-6, atol=1e-6)
    assert grad[slope64.abs() < 6e4].isfinite().all()


def test_a_capped_exponential_goes_on_along_its_tangent() -> None:
    x = tensor([1.0, EXPONENT_CAP, EXPONENT_CAP + 2, 1e4], requires_grad=True)
    found = capped_expm1(x)
    end = math.exp(EXPONENT_CAP)
    assert_close(found, tensor([math.e - 1, end, 3 * end, end * (1 + 1e4 - EXPONENT_CAP)]))
    (slope,) = torch.autograd.grad(found.sum(), x)
    assert_close(slope, tensor([math.e, end, end, end]))
