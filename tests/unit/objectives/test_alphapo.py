"""AlphaPO by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from tests.support.given import logprobs_of_pairs
from tunesmith.objectives.alphapo import alphapo, alphapo_loss, shaped
from tunesmith.objectives.simpo import simpo_loss


def test_rewards_of_a_half_and_a_quarter() -> None:
    """alpha 1: 1 - 1/p is -1 and -3; alpha -1: p - 1."""
    means_P = tensor([math.log(0.5), math.log(0.25)])
    assert_close(shaped(means_P, 1.0), tensor([-1.0, -3.0]))
    assert_close(shaped(means_P, -1.0), tensor([-0.5, -0.75]))
    loss_P = alphapo_loss(means_P[:1], means_P[1:], beta=0.5, gamma=0.25, alpha=1.0)
    assert_close(loss_P, tensor([math.log(1 + math.exp(-0.75))]))  # 0.5 * (-1 + 3) - 0.25


@pytest.mark.parametrize("alpha", [0.0, 1e-7, -1e-7])
def test_towards_alpha_0_it_is_simpo(alpha: float) -> None:
    pair = (tensor([-1.0, -3.0]), tensor([-2.0, -0.5]))
    assert_close(alphapo_loss(*pair, beta=2.0, gamma=1.0, alpha=alpha), simpo_loss(*pair, beta=2.0, gamma=1.0))


def test_an_answer_without_likelihood_is_pulled_back_and_overflows_nothing() -> None:
    chosen_P = tensor([-1000.0], requires_grad=True)
    loss_P = alphapo_loss(chosen_P, tensor([-1.0]), alpha=2.0)
    (slope,) = torch.autograd.grad(loss_P.sum(), chosen_P)
    assert loss_P.isfinite().all() and -1e15 < float(slope) < 0


def test_metrics_are_the_losss_own_rewards() -> None:
    found = alphapo(2.0, 0.5, 1.0).function(logprobs_of_pairs([[math.log(0.5)] * 2, [math.log(0.25)]]))
    assert found.metrics["margin"].mean() == pytest.approx(4.0)
    assert found.loss.mean() == pytest.approx(math.log(1 + math.exp(-3.5)))
