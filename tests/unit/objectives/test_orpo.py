"""ORPO by hand."""

from __future__ import annotations

import math

import torch
from torch import tensor
from torch.testing import assert_close

from tests.support.given import logprobs_of_pairs
from tunesmith.objectives.orpo import orpo, orpo_loss


def test_loss_of_a_probability_of_four_fifths_against_a_half() -> None:
    """Odds 4 against 1: -log 0.8 - 0.5 log(4 / 5)."""
    loss_P = orpo_loss(tensor([math.log(0.8)]), tensor([math.log(0.5)]), beta=0.5)
    assert_close(loss_P, tensor([-1.5 * math.log(0.8)]))


def test_the_objective_takes_means_over_tokens() -> None:
    """Chosen tokens of probability 0.9 and 0.4 (geometric mean 0.6, odds 1.5), rejected 0.25 (odds 1/3)."""
    logprobs = logprobs_of_pairs([[math.log(0.9), math.log(0.4)], [math.log(0.25)]])
    found = orpo(0.2).function(logprobs)
    assert found.loss.count == 1
    assert abs(found.loss.mean() - (-math.log(0.6) - 0.2 * math.log(4.5 / 5.5))) < 1e-6
    assert abs(found.metrics["margin"].mean() - 0.2 * math.log(0.6 / 0.25)) < 1e-6


def test_without_the_odds_ratio_it_is_sft_and_rewards_are_log_probs() -> None:
    logprobs = logprobs_of_pairs([[-1.0, -3.0], [-5.0]])
    found = orpo(0.0).function(logprobs)
    assert found.loss.mean() == 2 and found.metrics["margin"].mean() == 3
    (slope,) = torch.autograd.grad(found.loss.total, logprobs.logprob_N)
    assert slope.tolist() == [-0.5, -0.5, 0]
