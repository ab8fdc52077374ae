from __future__ import annotations

from math import exp

import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from tests.support.methods import random_logprobs
from tests.support.training import labeled_trees
from tunesmith.engine.logprobs import Logprobs
from tunesmith.objectives.kto import drift, kto, kto_loss


def sigmoid(x: float) -> float:
    return 1 / (1 + exp(-x))


def two_rows(mismatched: tuple[float, float] = (3.0, 1.0)) -> Logprobs:
    """A desirable answer 2 nats above its reference, an undesirable one 1 below; and their mismatched answers."""
    logratio_B = tensor([2.0, mismatched[0], -1.0, mismatched[1]])
    reference_N = tensor([-5.0, -4.0, -3.0, -6.0])
    policy_N = (reference_N + logratio_B).requires_grad_()
    return Logprobs(policy_N, torch.arange(4), tensor([0, 0, 1, 1]), reference_N, label_G=tensor([1.0, 0.0]))


def test_loss_of_each_label_by_hand() -> None:
    """beta 0.5, drift 2: the desirable answer stands at the baseline, the other 3 nats below it."""
    found = kto_loss(tensor([2.0, -1.0]), tensor([1.0, -1.0]), tensor([1.5, 0.8]), baseline=tensor(2.0), beta=0.5)
    assert_close(found, tensor([1.5 * 0.5, 0.8 * (1 - sigmoid(0.5 * 3))]))


def test_the_objective_by_hand() -> None:
    result = kto(0.5, 1.5, 0.8).function(two_rows())
    assert result.loss.count == 2
    assert float(result.loss.total.detach()) == pytest.approx(1.5 * 0.5 + 0.8 * (1 - sigmoid(1.5)), rel=1e-6)
    figures = {name: value.mean() for name, value in result.metrics.items()}
    assert figures["kl"] == 2.0  # (3 + 1) / 2
    assert (figures["reward_desirable"], figures["reward_undesirable"]) == (1.0, -0.5)
    assert figures["margin"] == 1.5
    assert figures["accuracy"] == 0.75  # one at the baseline is half a win, the other is below it
    assert figures["logprob_desirable"] == -3.0  # -5 + 2


def test_the_drift_is_never_below_zero_and_has_no_gradient() -> None:
    assert float(drift(tensor([-3.0, 1.0], requires_grad=True))) == 0
    seen = two_rows()
    (slope_N,) = torch.autograd.grad(kto(0.5).function(seen).loss.total, seen.logprob_N)
    assert slope_N[1] == slope_N[3] == 0
    assert slope_N[0] < 0 < slope_N[2]  # up with the desirable answer, down with the other


def test_a_step_of_one_label_has_no_margin() -> None:
    """Its mean is nan, which records keep as null."""
    trees = [tree for tree in labeled_trees() if tree.label]
    result = kto(0.1).function(random_logprobs(trees))
    assert result.metrics["margin"].count == result.metrics["reward_undesirable"].count == 0
    assert torch.isfinite(result.metrics["margin"].total)
