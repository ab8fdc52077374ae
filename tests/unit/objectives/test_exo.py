"""EXO by hand."""

from __future__ import annotations

import math

import torch
from torch import tensor
from torch.testing import assert_close

from tunesmith.objectives.exo import exo_loss


def test_loss_of_a_half_nat_margin() -> None:
    # q = (0.6225, 0.3775): 0.6225 * log(0.6225 / 0.9) + 0.3775 * log(0.3775 / 0.1) = -0.2295 + 0.5015
    loss_P = exo_loss(tensor([[2.0, -3.0]]), beta=0.1, label_smoothing=0.1)
    assert_close(loss_P, tensor([0.2720]), atol=1e-4, rtol=0)


def test_it_is_0_where_the_policy_prefers_as_the_data() -> None:
    agreed = tensor([[math.log(0.9 / 0.1), 0.0]], requires_grad=True)
    loss_P = exo_loss(agreed, beta=1.0, label_smoothing=0.1)
    (gradient_PK,) = torch.autograd.grad(loss_P.sum(), agreed)
    assert_close(loss_P, tensor([0.0]), atol=1e-6, rtol=0)
    assert_close(gradient_PK, torch.zeros(1, 2), atol=1e-6, rtol=0)


def test_it_is_bounded_where_the_policy_is_sure() -> None:
    """-log(1 - e) and -log(e), while DPO's loss grows with the margin; the gradient is 0 at both ends, never nan."""
    far = tensor([[3000.0, 0.0], [-3000.0, 0.0]], requires_grad=True)
    loss_P = exo_loss(far, beta=1.0, label_smoothing=1e-3)
    (gradient_PK,) = torch.autograd.grad(loss_P.sum(), far)
    assert_close(loss_P, tensor([0.0010005, 6.9078]), atol=1e-4, rtol=0)
    assert_close(gradient_PK, torch.zeros(2, 2))
