"""Robust DPO by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from tunesmith.objectives.robust import robust_dpo_loss

PAIR = tensor([[2.0, -3.0]])


def test_loss_of_a_half_nat_margin() -> None:
    # -log s(0.5) = 0.4741, -log s(-0.5) = 0.9741: (0.9 * 0.4741 - 0.1 * 0.9741) / 0.8
    assert_close(robust_dpo_loss(PAIR, beta=0.1, label_smoothing=0.1), tensor([0.4116]), atol=1e-4, rtol=0)


def test_its_mean_over_flipped_labels_is_the_loss_of_the_true_ones() -> None:
    """The paper's lemma: labels flipped with chance 0.2 give, on average, DPO's loss of the pair as it is."""
    for share in (0.1, 0.2, 0.4):
        given = robust_dpo_loss(PAIR, beta=0.1, label_smoothing=share)
        flipped = robust_dpo_loss(PAIR.flip(-1), beta=0.1, label_smoothing=share)
        expected = math.log(1 + math.exp(-0.5))
        assert_close((1 - share) * given + share * flipped, tensor([expected]), atol=1e-6, rtol=0)


def test_it_starts_at_ln_2_and_falls_below_0() -> None:
    assert robust_dpo_loss(torch.zeros(1, 2)).item() == pytest.approx(math.log(2))
    # -e / (1 - 2 e) of the margin, 0.1 / 0.8 * 3000
    assert_close(robust_dpo_loss(tensor([[3000.0, 0.0]]), beta=1.0), tensor([-375.0]))
    assert_close(robust_dpo_loss(tensor([[-3000.0, 0.0]]), beta=1.0), tensor([3375.0]))
