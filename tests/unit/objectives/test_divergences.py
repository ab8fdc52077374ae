"""The f-divergences of DPO, and margins from scores, by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from tests.support.given import logprobs_of_pairs
from tunesmith.errors import DataError
from tunesmith.objectives.divergences import Divergence, divergence_score
from tunesmith.objectives.dpo import dpo, dpo_loss

LN2 = math.log(2)


@pytest.mark.parametrize(
    ("divergence", "doubled", "halved"),
    [
        ("reverse_kl", LN2, -LN2),
        ("forward_kl", 0.5, -1.0),  # 1 - 1/u
        ("jensen_shannon", math.log(4 / 3), math.log(2 / 3)),  # log 2u/(1+u)
        ("alpha", 2 * (1 - 2**-0.5), 2 * (1 - 2**0.5)),  # (1 - u^-1/2) / (1/2)
    ],
)
def test_scores_of_a_probability_that_doubled_or_halved(divergence: Divergence, doubled: float, halved: float) -> None:
    found = divergence_score(tensor([LN2, -LN2, 0.0]), divergence, alpha=0.5)
    assert_close(found, tensor([doubled, halved, 0.0]))


def test_alpha_lies_between_the_two_kls() -> None:
    logratio = tensor([-1.0, 0.5, 2.0])
    for alpha, divergence in ((1e-6, "reverse_kl"), (1 - 1e-6, "forward_kl")):
        found = divergence_score(logratio, "alpha", alpha=alpha)
        assert_close(found, divergence_score(logratio, divergence), rtol=1e-5, atol=1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize("divergence", ["forward_kl", "jensen_shannon", "alpha"])
def test_nothing_overflows_and_lost_answers_are_pulled_back(divergence: Divergence) -> None:
    """A chosen answer 5,000 nats below the reference: finite loss, and a slope that raises it."""
    chosen_P = tensor([-5000.0], requires_grad=True)
    zero_P = torch.zeros(1)
    loss_P = dpo_loss(chosen_P, zero_P, zero_P, zero_P, beta=0.1, divergence=divergence)
    (slope,) = torch.autograd.grad(loss_P.sum(), chosen_P)
    assert loss_P.isfinite().all() and slope.isfinite().all() and float(slope) < 0
    assert float(slope.square()) < 1e30  # a norm over many weights still fits float32


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jensen_shannon", "alpha"])
def test_slopes_are_finite_differences(divergence: Divergence) -> None:
    torch.manual_seed(0)
    given = tuple(torch.randn(6, dtype=torch.float64, requires_grad=True) for _ in range(4))

    def loss(*parts: torch.Tensor) -> torch.Tensor:
        return dpo_loss(*parts, beta=0.7, label_smoothing=0.1, divergence=divergence, divergence_alpha=0.4)

    assert torch.autograd.gradcheck(loss, given)


def test_an_offset_asks_for_a_larger_margin() -> None:
    """Scores 5 and 3 at a scale of 0.25 ask for 0.5 nats; the rewards differ by 0.5 * (2 + 2) = 2."""
    logprobs = logprobs_of_pairs([[-1.0, -2.0], [-5.0]], [[-2.0, -3.0], [-3.0]], scores=[5.0, 3.0])
    loss = dpo(0.5, margin_scale=0.25).function(logprobs).loss.mean()
    assert loss == pytest.approx(math.log(1 + math.exp(-1.5)))
    assert dpo(0.5).function(logprobs).loss.mean() == pytest.approx(math.log(1 + math.exp(-2.0)))


def test_rows_without_scores_are_refused() -> None:
    logprobs = logprobs_of_pairs([[-1.0], [-5.0]], [[-2.0], [-3.0]])
    with pytest.raises(DataError, match="needs a score of both answers"):
        dpo(0.5, margin_scale=1.0).function(logprobs)
