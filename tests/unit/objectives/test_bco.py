"""BCO by hand: the loss, and the shift that it carries."""

from __future__ import annotations

import math

import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from tests.support.given import logprobs_of_pairs
from tunesmith.objectives import Carried
from tunesmith.objectives.bco import bco, bco_loss


def softplus(x: float) -> float:
    return math.log(1 + math.exp(x))


def test_loss_of_rewards_around_a_shift() -> None:
    """Rewards 1 and -2 against 0.5: logits 0.5 and -2.5."""
    loss_P = bco_loss(tensor([1.0]), tensor([-2.0]), shift=0.5)
    assert_close(loss_P, tensor([softplus(-0.5) + softplus(-2.5)]))


def test_where_the_policy_is_its_reference_it_is_twice_ln_2() -> None:
    answers = [[-1.0, -2.0], [-3.0]]
    assert bco(0.1).function(logprobs_of_pairs(answers, answers)).loss.mean() == pytest.approx(2 * math.log(2))


# Rewards at beta 0.5: pair 0 has 1 and -1 (log-ratios 2, -2), pair 1 has 2 and 2 (4, 4). Their mean is 1.
POLICY = [[-1.0, -2.0], [-5.0], [-1.0], [-2.0]]
REFERENCE = [[-2.0, -3.0], [-3.0], [-5.0], [-6.0]]


def test_the_shift_is_the_mean_reward_of_the_step_at_first() -> None:
    found = bco(0.5).function(logprobs_of_pairs(POLICY, REFERENCE))
    assert found.metrics["reward_shift"].mean() == pytest.approx(1.0)
    first, second = softplus(0) + softplus(-2), softplus(-1) + softplus(1)
    assert found.loss.mean() == pytest.approx((first + second) / 2)


def test_the_shift_goes_on_from_the_steps_before() -> None:
    """After a step with a sum of 4 over 4 rewards, the same rewards moved up by 1 make (4 + 8) / 8."""
    objective = bco(0.5)
    first = objective.function(logprobs_of_pairs(POLICY, REFERENCE))
    after = objective.advance(objective.start({}), first, {})
    assert after.numbers == {"reward_sum": 4.0, "num_rewards": 4.0}
    lower = [[value - 2 / len(answer) for value in answer] for answer in REFERENCE]  # log-ratios 2 higher
    second = objective.bound(after).function(logprobs_of_pairs(POLICY, lower))
    assert second.metrics["reward_shift"].mean() == pytest.approx(1.5)
    assert objective.advance(after, second, {}).numbers == pytest.approx({"reward_sum": 12.0, "num_rewards": 8.0})


def test_the_shift_takes_no_gradient() -> None:
    """The slope is beta * (s(r - 1) - 1) for chosen answers and beta * s(r - 1) for rejected ones, the shift fixed."""
    logprobs = logprobs_of_pairs(POLICY, REFERENCE)
    (slope,) = torch.autograd.grad(bco(0.5).function(logprobs).loss.total, logprobs.logprob_N)
    up, down = 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(2))
    assert_close(slope, 0.5 * tensor([-0.5, -0.5, down, up - 1, up]))


def test_it_is_scored_as_a_whole_step() -> None:
    assert not bco(0.1).separable


def test_many_rewards_before_hold_the_shift() -> None:
    far = bco(0.5).bound(Carried({"reward_sum": 3e6, "num_rewards": 1e6}))
    assert far.function(logprobs_of_pairs(POLICY, REFERENCE)).metrics["reward_shift"].mean() == pytest.approx(3, 1e-4)
