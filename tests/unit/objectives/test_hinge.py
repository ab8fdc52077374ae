"""The hinge by hand."""

from __future__ import annotations

import torch
from torch import tensor
from torch.testing import assert_close

from tunesmith.objectives.hinge import hinge_loss


def test_a_pair_counts_until_its_margin_is_1() -> None:
    pairs_PK = tensor([[2.0, -3.0], [0.0, 0.0], [-1.0, 4.0], [12.0, 1.0]], requires_grad=True)
    loss_P = hinge_loss(pairs_PK, beta=0.1)
    assert_close(loss_P, tensor([0.5, 1.0, 1.5, 0.0]))  # 1 - 0.1 * (5, 0, -5, 11), the last below 0
    (gradient_PK,) = torch.autograd.grad(loss_P.sum(), pairs_PK)
    assert_close(gradient_PK, tensor([[-0.1, 0.1]] * 3 + [[0.0, 0.0]]))
