"""DiscoPOP by hand: its blend, its hump, and that it stays finite."""

from __future__ import annotations

import math

import torch
from torch import Tensor, tensor
from torch.testing import assert_close

from tunesmith.objectives.discopop import discopop_loss


def slope(margin: float, temperature: float) -> float:
    pair = tensor([[margin, 0.0]], requires_grad=True)
    loss = discopop_loss(pair, beta=1.0, temperature=temperature).sum()
    return float(torch.autograd.grad(loss, pair)[0][0, 0])


def test_loss_of_a_blended_pair() -> None:
    # x = 0.5, m = s(0.5 / 0.5) = 0.7311: 0.2689 * 0.4741 + 0.7311 * 0.6065
    loss_P = discopop_loss(tensor([[2.0, -3.0]]), beta=0.1, temperature=0.5)
    assert_close(loss_P, tensor([0.5709]), atol=1e-4, rtol=0)


def test_far_from_0_it_is_one_of_its_parts() -> None:
    loss_P = discopop_loss(tensor([[3.0, 0.0], [-3.0, 0.0]]), beta=1.0, temperature=0.05)
    assert_close(loss_P, tensor([math.exp(-3), math.log(1 + math.exp(3))]))  # exponential above, logistic below


def test_at_the_start_it_pulls_the_wrong_way_unless_the_blend_is_wide() -> None:
    """Section 6.1 of the paper; the slope at 0, (1 - ln 2) / (4 temperature) - 3 / 4, changes sign at 0.1023."""
    assert_close(tensor(slope(0.0, 0.05)), tensor((1 - math.log(2)) / 0.2 - 0.75))
    assert slope(0.0, 0.05) > 0 > slope(0.0, 0.11)
    assert slope(0.2, 0.05) < 0  # past the hump


def test_it_is_finite_at_the_ends() -> None:
    """exp(100) is infinite in float32 and its weight is 0: taken apart, the product is nan."""
    for dtype in (torch.float32, torch.bfloat16):
        far: Tensor = tensor([[100.0, 0.0], [-100.0, 0.0], [-3000.0, 0.0]], dtype=dtype, requires_grad=True)
        loss_P = discopop_loss(far, beta=1.0, temperature=0.05)
        (gradient_PK,) = torch.autograd.grad(loss_P.sum(), far)
        assert_close(loss_P.float(), tensor([0.0, 100.0, 3000.0]), atol=1e-6, rtol=0.01)
        assert_close(gradient_PK[:, 0].float(), tensor([0.0, -1.0, -1.0]), atol=1e-6, rtol=0)
