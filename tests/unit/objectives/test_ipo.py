"""IPO by hand, and that its two readings are told apart (TRAPS 47)."""

from __future__ import annotations

import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from tunesmith.engine.logprobs import Logprobs
from tunesmith.objectives.ipo import ipo, ipo_loss


def a_pair(repeats: int = 1) -> Logprobs:
    """Log-ratios of the chosen answer 1 and 2, of the rejected one -1; every token `repeats` times."""
    ratios = [1.0, 2.0] * repeats + [-1.0] * repeats
    branch_N = tensor([0] * 2 * repeats + [1] * repeats)
    policy_N = (tensor(ratios) - 3).requires_grad_()
    return Logprobs(policy_N, branch_N, tensor([0, 0]), torch.full((len(ratios),), -3.0))


def test_the_margin_is_drawn_to_its_target() -> None:
    """1 / (2 * 0.1) = 5: a margin of 4 is short of it by 1, one of 7 is past it by 2, and both count."""
    pairs_PK = tensor([[1.0, -3.0], [4.0, -3.0], [2.5, -2.5]], requires_grad=True)
    loss_P = ipo_loss(pairs_PK, beta=0.1)
    assert_close(loss_P, tensor([1.0, 4.0, 0.0]))
    (gradient_PK,) = torch.autograd.grad(loss_P.sum(), pairs_PK)
    assert_close(gradient_PK, tensor([[-2.0, 2.0], [4.0, -4.0], [0.0, 0.0]]))


def test_mean_and_sum_read_the_same_pair_differently() -> None:
    assert ipo(0.5).function(a_pair()).loss.mean() == pytest.approx(2.25)  # (1.5 + 1 - 1)^2
    assert ipo(0.5, "sum").function(a_pair()).loss.mean() == pytest.approx(9.0)  # (3 + 1 - 1)^2


def test_repeated_tokens_change_the_sum_alone() -> None:
    assert ipo(0.5).function(a_pair(3)).loss.mean() == pytest.approx(2.25)
    assert ipo(0.5, "sum").function(a_pair(3)).loss.mean() == pytest.approx(121.0)  # (9 + 3 - 1)^2


def test_the_margin_of_the_metrics_is_the_one_that_is_drawn() -> None:
    """At the target it is beta / (2 beta) = 0.5, per token or not."""
    assert ipo(0.2).function(a_pair()).metrics["margin"].mean() == pytest.approx(0.5)  # 0.2 * (1.5 + 1)
    assert ipo(0.125, "sum").function(a_pair()).metrics["margin"].mean() == pytest.approx(0.5)  # 0.125 * (3 + 1)
