"""SPPO by hand."""

from __future__ import annotations

import torch
from torch import tensor
from torch.testing import assert_close

from tunesmith.objectives.sppo import sppo_loss


def test_each_answer_has_its_own_target() -> None:
    """1 / (2 * 0.1) = 5: the chosen answer is drawn to 5, the rejected one to -5, whatever the margin."""
    pairs_PK = tensor([[3.0, -6.0], [5.0, -5.0], [15.0, 5.0]], requires_grad=True)
    loss_P = sppo_loss(pairs_PK, beta=0.1)
    assert_close(loss_P, tensor([5.0, 0.0, 200.0]))  # 4 + 1; at the targets; a margin of 10, both 10 too high
    (gradient_PK,) = torch.autograd.grad(loss_P.sum(), pairs_PK)
    assert_close(gradient_PK, tensor([[-4.0, -2.0], [0.0, 0.0], [20.0, 20.0]]))


def test_the_papers_eta_of_1000() -> None:
    assert_close(sppo_loss(torch.zeros(1, 2), beta=1e-3), tensor([500_000.0]))  # 500^2 twice
