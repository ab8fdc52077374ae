"""AOT by hand: quantile against quantile, and that sorting is the cheapest transport."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from tunesmith.objectives.aot import aot, aot_loss, aot_unpaired, aot_unpaired_loss, quantile_loss
from tunesmith.objectives.dpo import dpo_loss
from tunesmith.objectives.pairs import PairOptions


def test_unpaired_compares_equal_ranks() -> None:
    """Chosen 3, -1, 1 and rejected 0, 2, -2 become -1, 1, 3 beside -2, 0, 2: every quantile is 1 ahead."""
    logratio_PK = tensor([[3.0, 0.0], [-1.0, 2.0], [1.0, -2.0]])
    assert_close(aot_unpaired_loss(logratio_PK, beta=0.5), tensor([0.4741] * 3), atol=1e-4, rtol=0)  # -log s(0.5)
    # pair by pair the second one is lost by 3
    assert dpo_loss(logratio_PK[1:2, 0], logratio_PK[1:2, 1], tensor([0.0]), tensor([0.0]), beta=0.5) > 1.7


def test_paired_compares_the_margins_of_policy_and_reference() -> None:
    """Margins 1, 4 under the policy and 3, 0 under the reference: 1 beside 0 and 4 beside 3."""
    policy_PK, reference_PK = tensor([[-1.0, -2.0], [-1.0, -5.0]]), tensor([[-1.0, -4.0], [-2.0, -2.0]])
    assert_close(aot_loss(policy_PK, reference_PK, beta=0.5), tensor([0.4741] * 2), atol=1e-4, rtol=0)


def test_label_smoothing_mixes_in_the_flipped_comparison() -> None:
    loss_P = aot_unpaired_loss(tensor([[1.0, 0.0]]), beta=0.5, label_smoothing=0.2)
    assert_close(loss_P, tensor([0.5741]), atol=1e-4, rtol=0)  # 0.8 * 0.4741 + 0.2 * 0.9741


def test_one_pair_is_dpo() -> None:
    policy_PK, reference_PK = tensor([[-10.0, -14.0]]), tensor([[-12.0, -11.0]])
    expected = dpo_loss(*policy_PK.T, *reference_PK.T, beta=0.1)
    assert_close(aot_loss(policy_PK, reference_PK, beta=0.1), expected)
    assert_close(aot_unpaired_loss(policy_PK - reference_PK, beta=0.1), expected)


def test_sorting_is_the_cheapest_transport() -> None:
    """Section 3 of the paper: of all pairings of the two samples, equal ranks cost least under a convex loss."""
    generator = torch.Generator().manual_seed(0)
    above_P, below_P = 4 * torch.randn(5, generator=generator), 4 * torch.randn(5, generator=generator)
    costs = [float(torch.log1p(torch.exp(-(above_P - below_P[list(order)]))).sum()) for order in permutations(range(5))]
    assert float(quantile_loss(above_P, below_P, beta=1.0).sum()) == pytest.approx(min(costs), rel=1e-6)
    assert max(costs) > 1.5 * min(costs)


def test_the_gradient_goes_back_to_where_each_value_came_from() -> None:
    logratio_PK = tensor([[3.0, 2.0], [-1.0, -5.0]], requires_grad=True)  # quantiles: -1 beside -5, 3 beside 2
    (gradient_PK,) = torch.autograd.grad(aot_unpaired_loss(logratio_PK, beta=1.0).sum(), logratio_PK)
    first, second = 1 / (1 + math.exp(1)), 1 / (1 + math.exp(4))  # sigmoid(-gap)
    assert_close(gradient_PK, tensor([[-first, first], [-second, second]]))
    crossed_PK = tensor([[3.0, -5.0], [-1.0, 2.0]], requires_grad=True)  # the same quantiles of other pairs
    (gradient_PK,) = torch.autograd.grad(aot_unpaired_loss(crossed_PK, beta=1.0).sum(), crossed_PK)
    assert_close(gradient_PK, tensor([[-first, second], [-second, first]]))


def test_equal_values_keep_the_order_of_the_step() -> None:
    """At the start all log-ratios are 0: every answer is pulled alike; later the earlier of equal ones ranks lower."""
    zero_PK = torch.zeros(40, 2, requires_grad=True)
    (gradient_PK,) = torch.autograd.grad(aot_unpaired_loss(zero_PK, beta=1.0).sum(), zero_PK)
    assert_close(gradient_PK, tensor([[-0.5, 0.5]]).expand(40, 2))
    # forty equal chosen values beside rejected ones that fall: a sort that is not stable would deal them anyhow
    tied_PK = torch.stack([torch.zeros(40), -torch.arange(40.0)], -1).requires_grad_()
    (gradient_PK,) = torch.autograd.grad(aot_unpaired_loss(tied_PK, beta=0.1).sum(), tied_PK)
    assert_close(gradient_PK[:, 0], -0.1 * torch.sigmoid(-0.1 * torch.arange(39.0, -1.0, -1.0)))


def test_a_quantile_is_no_pair_and_takes_no_weight() -> None:
    for make in (aot, aot_unpaired):
        assert not make(0.1).separable
        for weighted in (PairOptions(pair_weights=True), PairOptions(wpo=True)):
            with pytest.raises(AssertionError, match="quantile"):
                make(0.1, options=weighted)
