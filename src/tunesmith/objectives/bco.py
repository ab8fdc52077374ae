"""Binary classifier optimization on pairs: each answer is classified against the mean reward so far.

In: the figures of pairs. Out: the loss of each. Must not know: models, tokens.

Source: Jung et al. 2024, arXiv:2404.04656: theorem 1 (the classifier's loss bounds DPO's) and the reward shift delta,
the mean of the chosen and the rejected answers' rewards.

Shapes: P pairs, K = 2. Units: rewards are beta * nats.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import Tensor
from torch.nn.functional import logsigmoid

from tunesmith.engine.logprobs import Logprobs
from tunesmith.objectives.base import Carried, Carrying, Objective, Result, Sum
from tunesmith.objectives.pairs import PLAIN, PairOptions, Pairs, carried, paired

Shift = Callable[[Pairs], Tensor]
"""The reward that an answer is classified against, a scalar without gradient."""


def bco_loss(reward_chosen_P: Tensor, reward_rejected_P: Tensor, *, shift: Tensor | float = 0.0) -> Tensor:
    """Loss of each pair, [P], from the rewards of its answers, beta * (policy - reference), each [P].

    -log sigmoid(chosen - shift) - log sigmoid(-(rejected - shift)).
    """
    return -logsigmoid(reward_chosen_P - shift) - logsigmoid(shift - reward_rejected_P)


def mean_reward(pairs: Pairs, beta: float, before: Carried) -> Tensor:
    """Mean reward of all answers of all steps so far, this step's included; a scalar without gradient.

    Differs: the paper's expectation is over the data under the policy as it is; this is the mean over training, as the
    authors' own trainer takes it.
    """
    reward_PK = beta * pairs.logratio_PK.detach()
    return (reward_PK.sum() + before.numbers["reward_sum"]) / (reward_PK.numel() + before.numbers["num_rewards"])


def with_shift(make: Callable[[Shift], Objective], beta: float) -> Objective:
    """The objective of a paired method that needs the mean reward so far, carried from step to step.

    Every answer's gradient depends on all rewards of its step, so the method is not separable.
    """

    def bind(before: Carried) -> Callable[[Logprobs], Result]:
        return made(before).function

    def made(before: Carried) -> Objective:
        return make(lambda pairs: mean_reward(pairs, beta, before))

    fresh = Carried({"reward_sum": 0.0, "num_rewards": 0.0})
    objective = replace(made(fresh), separable=False)
    return carried(objective, Carrying(lambda weights: fresh, bind, _advance))


def _advance(before: Carried, result: Result, weights: Mapping[str, Tensor]) -> Carried:
    """The rewards of this step are added to those before it."""
    rewards = result.metrics["reward_chosen"] + result.metrics["reward_rejected"]
    return Carried(
        {
            "reward_sum": before.numbers["reward_sum"] + float(rewards.total),
            "num_rewards": before.numbers["num_rewards"] + rewards.count,
        }
    )


def shift_metric(shift: Tensor, pairs: Pairs) -> dict[str, Sum]:
    """The shift as a figure of the step: its mean over the pairs is itself."""
    count = len(pairs.policy_PK)
    return {"reward_shift": Sum(shift * count, float(count))}


def bco(beta: float, *, options: PairOptions = PLAIN) -> Objective:
    """The objective over trees of two branches, chosen first; one unit a pair."""

    def make(shift: Shift) -> Objective:
        def loss(pairs: Pairs) -> Tensor:
            reward_PK = beta * pairs.logratio_PK
            return bco_loss(reward_PK[:, 0], reward_PK[:, 1], shift=shift(pairs))

        def metrics(pairs: Pairs) -> Mapping[str, Sum]:
            return shift_metric(shift(pairs), pairs)

        return paired("bco", loss, beta=beta, options=options, more_metrics=metrics)

    return with_shift(make, beta)
