from __future__ import annotations

from math import exp, log

import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from tunesmith.engine.logprobs import Logprobs
from tunesmith.objectives.bco_unpaired import NOTHING, bco_unpaired, bco_unpaired_loss, reward_shift


def minus_log_sigmoid(x: float) -> float:
    return log(1 + exp(-x))


def three_rows() -> Logprobs:
    """Log-ratios 4, 2 (desirable) and -2 (not), one branch a tree: nothing is mismatched here."""
    reference_N = tensor([-5.0, -4.0, -3.0])
    policy_N = (reference_N + tensor([4.0, 2.0, -2.0])).requires_grad_()
    return Logprobs(policy_N, torch.arange(3), torch.arange(3), reference_N, label_G=tensor([1.0, 1.0, 0.0]))


def test_loss_of_each_label_by_hand() -> None:
    found = bco_unpaired_loss(tensor([1.0, -1.0]), tensor([1.0, -1.0]), tensor([1.0, 2.0]), shift=tensor(0.5))
    assert_close(found, tensor([minus_log_sigmoid(0.5), 2 * minus_log_sigmoid(1.5)]))


def test_the_shift_is_the_mean_of_both_labels_means() -> None:
    """(4 + 2) / 2 = 3 and -2, so 0.5; the mean over all three would be 4 / 3."""
    rewards, labels = tensor([4.0, 2.0, -2.0]), tensor([True, True, False])
    assert float(reward_shift(rewards, labels)) == 0.5
    before = {"reward_desirable": 6.0, "num_desirable": 2.0, "reward_undesirable": -4.0, "num_undesirable": 1.0}
    assert float(reward_shift(rewards, labels, before)) == 0.0  # 12 / 4 and -6 / 2
    assert float(reward_shift(rewards[:2], labels[:2])) == 3.0  # the other label has not been met


def test_rewards_are_carried_from_step_to_step() -> None:
    method = bco_unpaired(0.5)
    carried = method.start({})
    assert carried.numbers == NOTHING
    result = method.bound(carried).function(three_rows())
    assert result.metrics["reward_shift"].mean() == 0.25  # beta * 0.5
    assert float(result.loss.total.detach()) == pytest.approx(
        minus_log_sigmoid(1.75) + minus_log_sigmoid(0.75) + minus_log_sigmoid(1.25), rel=1e-6
    )
    carried = method.advance(carried, result, {})
    assert carried.numbers == {
        "reward_desirable": 3.0,
        "num_desirable": 2.0,
        "reward_undesirable": -1.0,
        "num_undesirable": 1.0,
    }
    again = method.advance(carried, method.bound(carried).function(three_rows()), {})
    assert again.numbers["reward_desirable"] == 6.0
    assert carried.numbers["reward_desirable"] == 3.0  # what was carried is not changed
    assert NOTHING["num_desirable"] == 0
