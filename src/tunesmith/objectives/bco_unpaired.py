"""Binary classifier optimization on single answers: a classifier whose logit is the implicit reward.

In: the figures of judged answers, and the rewards of earlier steps. Out: the loss of each answer.
Must not know: models, tokens, files.

Source: Jung et al. 2024, arXiv:2404.04656: the binary cross-entropy of the reward (their upper bound of DPO's loss)
with the reward shift delta = (E_desirable[r] + E_undesirable[r]) / 2.

Shapes: G judged answers. Units: rewards in nats (beta * log-ratio).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tunesmith.engine.logprobs import Logprobs
from tunesmith.objectives.base import Carried, Carrying, Objective, Result, Sum
from tunesmith.objectives.labels import Labeled, class_weight_G, label_metrics, labeled_of, one_unit

NOTHING = {"reward_desirable": 0.0, "num_desirable": 0.0, "reward_undesirable": 0.0, "num_undesirable": 0.0}
"""What is carried: sums of the rewards so far, and how many they are, for both labels."""


def bco_unpaired_loss(reward_G: Tensor, sign_G: Tensor, weight_G: Tensor, *, shift: Tensor) -> Tensor:
    """Loss of each answer, [G]: -log sigmoid(sign (r - delta)), Jung et al. 2024 (arXiv:2404.04656).

    reward_G: beta * log pi/pi_ref of whole answers; sign_G: 1 desirable, -1 undesirable; shift: delta, no gradient.
    Differs: undesirable answers are not weighted by how desirable their prompts look (the paper's underlying
    distribution matching); `weight_G` is by label alone.
    """
    return -weight_G * logsigmoid(sign_G * (reward_G - shift))


def reward_shift(reward_G: Tensor, is_desirable_G: Tensor, before: Mapping[str, float] = NOTHING) -> Tensor:
    """delta: the mean of both labels' mean rewards, over the steps so far and this one; a scalar without gradient.

    Differs: the expectations are running means, this step's rewards among them; a label that has not been met
    is left out. (The authors' trainer takes one mean over all rewards, which is the same where the labels balance.)
    """
    means = []
    for name, chosen_G in (("desirable", is_desirable_G), ("undesirable", ~is_desirable_G)):
        number = before[f"num_{name}"] + float(chosen_G.sum())
        if number:
            means.append((before[f"reward_{name}"] + reward_G.detach()[chosen_G].sum()) / number)
    return torch.stack(means).mean()


def bco_unpaired(beta: float, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> Objective:
    """The objective over trees of a judged answer; one unit a tree. Carries the rewards so far from step to step."""

    def bind(carried: Carried) -> Callable[[Logprobs], Result]:
        def function(logprobs: Logprobs) -> Result:
            answers = labeled_of(logprobs)
            reward_G = beta * answers.logratio_G
            shift = reward_shift(reward_G, answers.is_desirable_G, carried.numbers)
            weight_G = class_weight_G(answers, desirable_weight, undesirable_weight)
            loss_G = bco_unpaired_loss(reward_G, answers.sign_G, weight_G, shift=shift)
            return Result(Sum(loss_G.sum(), float(len(loss_G))), _metrics(answers, beta, shift))

        return function

    carrying = Carrying(start=lambda weights: Carried(dict(NOTHING)), bind=bind, advance=_advance)
    return Objective(
        "bco_unpaired",
        bind(Carried(NOTHING)),
        one_unit,
        num_answers=1,
        needs_reference=True,
        separable=False,
        carrying=carrying,
    )


def _metrics(answers: Labeled, beta: float, shift: Tensor) -> dict[str, Sum]:
    with torch.no_grad():
        return label_metrics(answers, beta, shift) | {"reward_shift": Sum(shift, 1.0)}


def _advance(carried: Carried, result: Result, weights: Mapping[str, Tensor]) -> Carried:
    """The step's rewards are added to those before."""
    numbers = dict(carried.numbers)
    for name in ("desirable", "undesirable"):
        found = result.metrics[f"reward_{name}"]
        numbers[f"reward_{name}"] += float(found.total)
        numbers[f"num_{name}"] += found.count
    return Carried(numbers)
