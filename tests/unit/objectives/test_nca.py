"""NCA by hand."""

from __future__ import annotations

import math

import torch
from torch import tensor
from torch.testing import assert_close

from tunesmith.objectives.nca import nca_loss


def test_loss_of_a_pair() -> None:
    # r = (1, -1): -log s(1) = 0.3133, -log s(-1) = 1.3133: 0.3133 + 1.3133 / 2 + 0.3133 / 2
    assert_close(nca_loss(tensor([[5.0, -5.0]]), beta=0.2), tensor([1.1265]), atol=1e-4, rtol=0)
    assert_close(nca_loss(torch.zeros(1, 2)), tensor([2 * math.log(2)]))


def test_a_falling_chosen_answer_costs_although_the_margin_stands() -> None:
    """What DPO does not see: both answers 5 nats less likely, the margin as before."""
    above, below = nca_loss(tensor([[2.0, -2.0], [-3.0, -7.0]]), beta=1.0)
    assert below > 2 * above  # 1.2539 and 3.0733


def test_the_pull_on_the_chosen_answer_ends_at_two_thirds() -> None:
    """-s(-r) + s(r) / 2 is 0 at s(r) = 2/3, r = ln 2: the pull ends by itself."""
    balanced = tensor([[math.log(2), -3.0]], requires_grad=True)
    (gradient_PK,) = torch.autograd.grad(nca_loss(balanced, beta=1.0).sum(), balanced)
    assert_close(gradient_PK, tensor([[0.0, 0.0237]]), atol=1e-4, rtol=0)  # s(-3) / 2
