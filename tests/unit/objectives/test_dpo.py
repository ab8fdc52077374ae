"""DPO by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from tunesmith.engine.logprobs import Logprobs
from tunesmith.objectives import dpo, dpo_loss


def test_loss_of_a_half_nat_margin() -> None:
    loss_P = dpo_loss(tensor([-10.0]), tensor([-14.0]), tensor([-12.0]), tensor([-11.0]), beta=0.1)
    assert_close(loss_P, tensor([0.4741]), atol=1e-4, rtol=0)  # -log sigmoid(0.1 * ((-10 + 12) - (-14 + 11)))


def test_label_smoothing_mixes_in_the_flipped_pair() -> None:
    loss_P = dpo_loss(tensor([-10.0]), tensor([-14.0]), tensor([-12.0]), tensor([-11.0]), beta=0.1, label_smoothing=0.2)
    assert_close(loss_P, tensor([0.5741]), atol=1e-4, rtol=0)  # 0.8 * 0.4741 + 0.2 * (0.4741 + 0.5)


def test_the_loss_starts_at_ln_2_and_stays_finite_at_the_ends() -> None:
    zero = tensor([0.0])
    assert_close(dpo_loss(zero, zero, zero, zero), tensor([math.log(2)]))
    far = dpo_loss(tensor([-3000.0]), tensor([0.0]), zero, zero, beta=1.0)
    assert_close(far, tensor([3000.0]))
    assert_close(dpo_loss(tensor([0.0]), tensor([-3000.0]), zero, zero, beta=1.0), zero)


def _two_pairs() -> Logprobs:
    """Pair 0: chosen -1 -2 (reference -2 -2), rejected -3 (-1); pair 1: chosen -1 (-1), rejected -4 (-4)."""
    return Logprobs(
        tensor([-1.0, -2.0, -3.0, -1.0, -4.0], requires_grad=True),
        tensor([0, 0, 1, 2, 3]),
        tensor([0, 0, 1, 1]),
        tensor([-2.0, -2.0, -1.0, -1.0, -4.0]),
    )


def test_metrics_are_sums_over_pairs() -> None:
    result = dpo(beta=0.5).function(_two_pairs())
    means = {name: value.mean() for name, value in result.metrics.items()}
    assert result.loss.count == 2
    assert result.loss.mean() == pytest.approx((math.log(1 + math.exp(-1.5)) + math.log(2)) / 2, abs=1e-6)
    assert means == pytest.approx(
        {
            "reward_chosen": 0.25,  # 0.5 * (1, 0)
            "reward_rejected": -0.5,  # 0.5 * (-2, 0)
            "margin": 0.75,
            "accuracy": 0.75,  # one win, one tie
            "logratio_chosen": 0.5,
            "logratio_rejected": -1.0,
            "logprob_chosen": -2.0,
            "logprob_rejected": -3.5,
            "tokens_chosen": 1.5,
            "tokens_rejected": 1.0,
        }
    )


def test_the_gradient_of_a_token_is_its_pairs_coefficient() -> None:
    logprobs = _two_pairs()
    (gradient,) = torch.autograd.grad(dpo(beta=0.5).function(logprobs).loss.total, logprobs.logprob_N)
    first, second = 0.5 * (1 - 1 / (1 + math.exp(-1.5))), 0.25  # beta * sigmoid(-margin)
    assert_close(gradient, tensor([-first, -first, first, -second, second]), atol=1e-6, rtol=0)


def test_label_smoothing_changes_the_gradient() -> None:
    plain, smooth = _two_pairs(), _two_pairs()
    (one,) = torch.autograd.grad(dpo(beta=0.5).function(plain).loss.total, plain.logprob_N)
    (two,) = torch.autograd.grad(dpo(beta=0.5, label_smoothing=0.1).function(smooth).loss.total, smooth.logprob_N)
    assert not torch.allclose(one, two)
