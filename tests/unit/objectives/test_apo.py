"""APO by hand: which way each answer goes."""

from __future__ import annotations

import torch
from torch import tensor
from torch.testing import assert_close

from tunesmith.objectives.apo import apo_down_loss, apo_zero_loss

PAIR = tensor([[2.0, -3.0]])


def gradients(loss: torch.Tensor, pairs_PK: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss.sum(), pairs_PK)[0]


def test_zero_of_a_pair() -> None:
    # 1 - s(1) + s(-1.5) = 1 - 0.7311 + 0.1824
    assert_close(apo_zero_loss(PAIR, beta=0.5), tensor([0.4514]), atol=1e-4, rtol=0)


def test_down_of_a_pair() -> None:
    # s(1) + 1 - s(2.5) = 0.7311 + 1 - 0.9241
    assert_close(apo_down_loss(PAIR, beta=0.5), tensor([0.8069]), atol=1e-4, rtol=0)


def test_both_start_at_1() -> None:
    assert_close(apo_zero_loss(torch.zeros(1, 2)), tensor([1.0]))
    assert_close(apo_down_loss(torch.zeros(1, 2)), tensor([1.0]))


def test_zero_raises_the_chosen_answer_and_down_lowers_both() -> None:
    won = tensor([[2.0, -3.0]], requires_grad=True)
    (up,), (down,) = gradients(apo_zero_loss(won, beta=0.5), won), gradients(apo_down_loss(won, beta=0.5), won)
    assert up[0] < 0 < up[1]
    assert down[0] > 0 and down[1] > 0
    # 0.5 * s'(1) - 0.5 * s'(2.5), 0.5 * s'(2.5), with s'(1) = 0.1966, s'(2.5) = 0.0701
    assert_close(down, tensor([0.0633, 0.0351]), atol=1e-4, rtol=0)
