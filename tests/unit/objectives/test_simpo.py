"""SimPO by hand."""

from __future__ import annotations

import math

import torch
from torch import tensor
from torch.testing import assert_close

from tests.support.given import logprobs_of_pairs
from tunesmith.objectives.simpo import simpo, simpo_loss


def test_loss_at_the_target_margin_is_ln_2() -> None:
    """beta * (-1 + 1.5) = 1 = gamma; half a nat more is -log sigmoid(1)."""
    loss_P = simpo_loss(tensor([-1.0, -1.0]), tensor([-1.5, -2.0]), beta=2.0, gamma=1.0)
    assert_close(loss_P, tensor([math.log(2), math.log(1 + math.exp(-1))]))


def test_the_objective_takes_means_over_tokens() -> None:
    """Means -2 and -4: logit 0.5 * 2 - 0.25; each token of an answer carries an equal share of the slope."""
    logprobs = logprobs_of_pairs([[-1.0, -3.0], [-4.0]])
    found = simpo(0.5, 0.25).function(logprobs)
    assert abs(found.loss.mean() - math.log(1 + math.exp(-0.75))) < 1e-6
    assert found.metrics["margin"].mean() == 1  # of the rewards, without the target
    (slope,) = torch.autograd.grad(found.loss.total, logprobs.logprob_N)
    share = 0.5 / (1 + math.exp(0.75))
    assert_close(slope, tensor([-share / 2, -share / 2, share]))
