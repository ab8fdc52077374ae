"""Plackett-Luce and best-against-rest, and what they share."""

from __future__ import annotations

from math import exp, log

import pytest
import torch
from torch import Tensor, tensor
from torch.testing import assert_close

from tunesmith.engine.logprobs import Logprobs
from tunesmith.objectives.best_against_rest import best_against_rest
from tunesmith.objectives.dpo import dpo_loss
from tunesmith.objectives.plackett_luce import plackett_luce


def rows(logratio_B: list[float], score_B: list[float], tree_B: list[int]) -> Logprobs:
    """One token an answer, references of -5."""
    reference_N = torch.full((len(tree_B),), -5.0)
    policy_N = (reference_N + tensor(logratio_B)).requires_grad_()
    return Logprobs(policy_N, torch.arange(len(tree_B)), tensor(tree_B), reference_N, score_B=tensor(score_B))


def loss_of(seen: Logprobs, beta: float = 1.0) -> Tensor:
    return plackett_luce(beta).function(seen).loss.total


def test_a_ranking_of_three_by_hand() -> None:
    """Rewards 1, 0, 2 in the file; by scores the order is third, first, second."""
    seen = rows([1.0, 0.0, 2.0], [2.0, 1.0, 3.0], [0, 0, 0])
    e = exp(1)
    expected = log((e**2 + e + 1) / e**2) + log((e + 1) / e)  # then one is left, and its choice is certain
    assert float(loss_of(seen).detach()) == pytest.approx(expected, rel=1e-6)
    best = best_against_rest(1.0).function(seen)
    assert float(best.loss.total.detach()) == pytest.approx(log((e**2 + e + 1) / e**2), rel=1e-6)


def test_two_answers_are_dpo() -> None:
    seen = rows([0.7, -0.4], [0.0, 5.0], [0, 0])  # the second is the better one
    reference = tensor([-5.0])
    expected = dpo_loss(tensor([-5.4]), tensor([-4.3]), reference, reference, beta=0.5)
    assert_close(loss_of(seen, 0.5).detach(), expected.sum())
    assert_close(best_against_rest(0.5).function(seen).loss.total.detach(), expected.sum())


def test_rows_of_unequal_length_do_not_touch() -> None:
    one, two = rows([1.0, 0.0, 2.0], [2.0, 1.0, 3.0], [0, 0, 0]), rows([3.0, -1.0], [1.0, 0.0], [0, 0])
    both = rows([1.0, 0.0, 2.0, 3.0, -1.0], [2.0, 1.0, 3.0, 1.0, 0.0], [0, 0, 0, 1, 1])
    assert_close(loss_of(both), loss_of(one) + loss_of(two))
    (slope_N,) = torch.autograd.grad(loss_of(both), both.logprob_N)
    (alone_N,) = torch.autograd.grad(loss_of(two), two.logprob_N)
    assert_close(slope_N[3:], alone_N)
    assert torch.isfinite(slope_N).all()


def test_equal_scores_do_not_compete() -> None:
    """Two equal best answers over one: each against that one alone, and nothing between them."""
    seen = rows([1.0, 4.0, 0.0], [2.0, 2.0, 1.0], [0, 0, 0])
    each = [log((exp(1) + 1) / exp(1)), log((exp(4) + 1) / exp(4))]
    assert float(loss_of(seen).detach()) == pytest.approx(sum(each), rel=1e-6)
    assert float(best_against_rest(1.0).function(seen).loss.total.detach()) == pytest.approx(sum(each) / 2, rel=1e-6)


def test_metrics_by_hand() -> None:
    """Scores order third, first, second; rewards (beta 0.5) are 0.5, 1, 2: one of three pairs is in the wrong order."""
    metrics = plackett_luce(0.5).function(rows([1.0, 2.0, 4.0], [2.0, 1.0, 3.0], [0, 0, 0])).metrics
    figures = {name: value.mean() for name, value in metrics.items()}
    assert figures["accuracy"] == pytest.approx(2 / 3)
    assert (figures["reward_chosen"], figures["reward_rejected"], figures["margin"]) == (2.0, 1.0, 1.0)
    assert (figures["logratio_chosen"], figures["logprob_chosen"], figures["tokens_chosen"]) == (4.0, -1.0, 1.0)


def test_rewards_far_apart_stay_finite() -> None:
    seen = rows([-500.0, 500.0, 0.0], [3.0, 2.0, 1.0], [0, 0, 0])
    loss = loss_of(seen)
    assert float(loss.detach()) == pytest.approx(1000.0)
    assert torch.isfinite(torch.autograd.grad(loss, seen.logprob_N)[0]).all()
