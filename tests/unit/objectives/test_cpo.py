"""CPO by hand."""

from __future__ import annotations

import math

from torch import tensor
from torch.testing import assert_close

from tests.support.given import logprobs_of_pairs
from tunesmith.objectives.cpo import cpo, cpo_loss
from tunesmith.objectives.pairs import PairOptions


def test_loss_of_a_margin_of_one_nat() -> None:
    plain_P = cpo_loss(tensor([-10.0]), tensor([-20.0]), beta=0.1)
    assert_close(plain_P, tensor([0.31326]), atol=1e-5, rtol=0)  # log(1 + 1/e)
    smooth_P = cpo_loss(tensor([-10.0]), tensor([-20.0]), beta=0.1, label_smoothing=0.2)
    assert_close(smooth_P, tensor([0.51326]), atol=1e-5, rtol=0)  # 0.2 of the time 1 nat more


def test_the_objective_sums_tokens_and_adds_sft_per_token() -> None:
    """Sums -4 and -6, beta 0.5: the margin is 1, and the chosen tokens' mean is -2."""
    logprobs = logprobs_of_pairs([[-1.0, -3.0], [-6.0]])
    found = cpo(0.5, options=PairOptions(sft_weight=0.25)).function(logprobs)
    assert abs(found.loss.mean() - (math.log(1 + math.exp(-1)) + 0.25 * 2)) < 1e-6
    metrics = {name: value.mean() for name, value in found.metrics.items()}
    assert (metrics["reward_chosen"], metrics["reward_rejected"]) == (-2, -3)  # of sums, as in the loss
    assert (metrics["margin"], metrics["accuracy"], metrics["logprob_chosen"]) == (1, 1, -4)


def test_accuracy_is_that_of_the_losss_own_rewards() -> None:
    """The chosen answer wins per token (-2 against -3) and loses as a whole (-4 against -3)."""
    logprobs = logprobs_of_pairs([[-2.0, -2.0], [-3.0]])
    assert cpo(0.5).function(logprobs).metrics["accuracy"].mean() == 0
