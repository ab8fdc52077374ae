"""The reward model's loss and calibration by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from tunesmith.engine.logprobs import Logprobs
from tunesmith.errors import DataError
from tunesmith.objectives.reward import calibration, reward, reward_loss, reward_metrics


def test_loss_of_a_lead_of_two() -> None:
    loss_P = reward_loss(tensor([1.5]), tensor([-0.5]))
    assert_close(loss_P, tensor([0.1269]), atol=1e-4, rtol=0)  # log(1 + exp(-2))


def test_a_margin_asks_for_more() -> None:
    loss_P = reward_loss(tensor([1.5]), tensor([-0.5]), margin_P=tensor([3.0]))
    assert_close(loss_P, tensor([1.3133]), atol=1e-4, rtol=0)  # log(1 + exp(1)): two is one short of three


def test_centering_counts_the_square_of_the_sum() -> None:
    loss_P = reward_loss(tensor([1.5]), tensor([-0.5]), centering=0.01)
    assert_close(loss_P, tensor([0.1369]), atol=1e-4, rtol=0)  # 0.1269 + 0.01 * (1.5 - 0.5)^2


def test_the_loss_is_finite_far_out() -> None:
    assert_close(reward_loss(tensor([-2000.0]), tensor([1000.0])), tensor([3000.0]))
    assert_close(reward_loss(tensor([1000.0]), tensor([-2000.0])), tensor([0.0]))


def test_equal_scores_are_half_right() -> None:
    metrics = reward_metrics(tensor([[1.0, 1.0], [2.0, 0.0]]))
    assert metrics["accuracy"].mean() == 0.75
    assert metrics["margin"].mean() == 1.0
    sure = 1 / (1 + math.exp(-2))
    assert metrics["brier"].mean() == pytest.approx((0.5**2 + (1 - sure) ** 2) / 2, rel=1e-6)


def _logit(share: float) -> float:
    return math.log(share / (1 - share))


def test_calibration_of_four_pairs() -> None:
    """Two pairs at 65 %, one of them wrong; two at 95 %, both right."""
    margin_P = tensor([_logit(0.65), -_logit(0.65), _logit(0.95), _logit(0.95)], dtype=torch.float64)
    found = calibration(margin_P)
    assert found["confidence_60"].mean() == pytest.approx(0.65)
    assert found["accuracy_60"].mean() == 0.5
    assert found["share_60"].mean() == 0.5
    assert found["accuracy_90"].mean() == 1.0
    assert math.isnan(found["accuracy_70"].mean())
    assert found["share_70"].mean() == 0.0
    assert found["calibration_error"].mean() == pytest.approx((2 * 0.15 + 2 * 0.05) / 4)


def test_every_pair_is_in_one_bin() -> None:
    margin_P = tensor([0.0, 50.0, -50.0, _logit(0.6), _logit(0.7) + 1e-9, 1.0], dtype=torch.float64)
    found = calibration(margin_P)
    assert sum(value.mean() for name, value in found.items() if name.startswith("share_")) == pytest.approx(1.0)


def _scores(score_B: torch.Tensor | None = None) -> Logprobs:
    """Pair 0: 2 against 1; pair 1: 0 against 1."""
    values = tensor([2.0, 1.0, 0.0, 1.0], requires_grad=True)
    return Logprobs(values, torch.arange(4), tensor([0, 0, 1, 1]), score_B=score_B)


def test_the_objective_sums_over_pairs_and_pushes_the_sides_apart() -> None:
    seen = _scores()
    result = reward().function(seen)
    assert result.loss.count == 2
    assert float(result.loss.total) == pytest.approx(0.3133 + 1.3133, abs=1e-4)  # log(1 + e^-1), log(1 + e)
    (gradient_N,) = torch.autograd.grad(result.loss.total, seen.logprob_N)
    assert_close(gradient_N, tensor([-0.2689, 0.2689, -0.7311, 0.7311]), atol=1e-4, rtol=0)


def test_margins_are_the_rows_and_must_be_there() -> None:
    asked = reward(margins=True)
    result = asked.function(_scores(tensor([5.0, 4.0, 3.0, 3.0])))
    assert float(result.loss.total) == pytest.approx(0.6931 + 1.3133, abs=1e-4)  # leads of 1 - 1 and of -1 - 0
    with pytest.raises(DataError, match="chosen_score"):
        asked.function(_scores())


def test_only_an_evaluation_has_calibration() -> None:
    objective = reward()
    assert "calibration_error" not in objective.function(_scores()).metrics
    assert "calibration_error" in objective.for_evaluation().function(_scores()).metrics
