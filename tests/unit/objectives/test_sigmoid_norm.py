"""Length-normalized DPO by hand."""

from __future__ import annotations

import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from tunesmith.engine.logprobs import Logprobs
from tunesmith.objectives.sigmoid_norm import sigmoid_norm, sigmoid_norm_loss


def two_and_four_tokens(repeats: int = 1) -> Logprobs:
    """Chosen: log-ratios 1 and 0, mean 0.5; rejected: 1, 1, 0 and 0, mean 0.5. `repeats`: the chosen one's tokens."""
    policy = [-1.0, -2.0] * repeats + [-1.0, -1.0, -2.0, -2.0]
    branch_N = tensor([0] * 2 * repeats + [1] * 4)
    return Logprobs(tensor(policy, requires_grad=True), branch_N, tensor([0, 0]), torch.full((len(policy),), -2.0))


def test_loss_of_a_tenth_of_a_nat_a_token() -> None:
    loss_P = sigmoid_norm_loss(tensor([[0.3, 0.2]]), beta=5.0)
    assert_close(loss_P, tensor([0.4741]), atol=1e-4, rtol=0)  # -log sigmoid(5 * 0.1)


def test_a_longer_answer_has_no_more_to_win() -> None:
    """Sums would say that the rejected answer wins, 2 against 1; and repeating the chosen tokens changes nothing."""
    for repeats in (1, 3):
        result = sigmoid_norm(5.0).function(two_and_four_tokens(repeats))
        assert result.loss.mean() == pytest.approx(0.6931, abs=1e-4)


def test_the_metrics_rewards_are_those_of_the_loss() -> None:
    means = {name: value.mean() for name, value in sigmoid_norm(5.0).function(two_and_four_tokens()).metrics.items()}
    assert means["reward_chosen"] == means["reward_rejected"] == 2.5  # 5 * 0.5
    assert means["margin"] == 0 and means["accuracy"] == 0.5
    assert (means["logratio_chosen"], means["logratio_rejected"]) == (1.0, 2.0)  # of whole answers, as everywhere


def test_the_gradient_of_a_token_is_over_its_answers_length() -> None:
    logprobs = two_and_four_tokens()
    (gradient_N,) = torch.autograd.grad(sigmoid_norm(5.0).function(logprobs).loss.total, logprobs.logprob_N)
    # beta * sigmoid(0) = 2.5, over 2 and over 4 tokens
    assert_close(gradient_N, tensor([-1.25, -1.25, 0.625, 0.625, 0.625, 0.625]))
