"""Mixtures of losses by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from tests.support.given import logprobs_of_pairs
from tunesmith.objectives.mixture import mixture
from tunesmith.objectives.pairs import PairOptions
from tunesmith.recipe.preferences import MixtureWeights

# At beta 0.5 the rewards are 1 and -1, of two tokens and of one: margin 2, mean reward 0, chosen tokens' mean -1.5.
POLICY, REFERENCE = [[-1.0, -2.0], [-5.0]], [[-2.0, -3.0], [-3.0]]
PARTS = {
    "dpo": math.log(1 + math.exp(-2)),
    "bco": 2 * math.log(1 + math.exp(-1)),
    "sft": 1.5,
    "hinge": 0.0,
    "ipo": (3.0 - 1.0) ** 2,  # log-ratios per token 1 and -2, target 1 / (2 beta)
    "apo_zero": 2 / (1 + math.exp(1)),
}
NONE = dict.fromkeys(PARTS, 0.0)


@pytest.mark.parametrize("name", PARTS)
def test_each_part_alone(name: str) -> None:
    weights = MixtureWeights(**(NONE | {name: 0.5}))
    found = mixture(0.5, weights).function(logprobs_of_pairs(POLICY, REFERENCE))
    assert found.loss.mean() == pytest.approx(0.5 * PARTS[name], abs=1e-6)


def test_the_defaults_are_mpos() -> None:
    found = mixture(0.5, MixtureWeights()).function(logprobs_of_pairs(POLICY, REFERENCE))
    assert found.loss.mean() == pytest.approx(0.8 * PARTS["dpo"] + 0.2 * PARTS["bco"] + PARTS["sft"], abs=1e-6)


def test_only_bco_makes_a_step_one_whole_and_carries() -> None:
    without = mixture(0.5, MixtureWeights(bco=0.0))
    assert without.separable and without.carrying is None
    with_bco = mixture(0.5, MixtureWeights())
    assert not with_bco.separable and with_bco.start({}).numbers == {"reward_sum": 0.0, "num_rewards": 0.0}


def test_sft_weight_adds_to_the_part_of_its_name() -> None:
    logprobs = logprobs_of_pairs(POLICY, REFERENCE)
    objective = mixture(0.5, MixtureWeights(**(NONE | {"sft": 1.0})), options=PairOptions(sft_weight=0.5))
    (slope,) = torch.autograd.grad(objective.function(logprobs).loss.total, logprobs.logprob_N)
    assert_close(slope, tensor([-0.75, -0.75, 0.0]))
