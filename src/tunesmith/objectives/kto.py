"""Kahneman-Tversky optimization: single answers with a label, measured against the policy's drift.

In: the figures of judged answers. Out: the loss of each. Must not know: models, tokens, where mismatched answers
came from.

Source: Ethayarajh et al. 2024, arXiv:2402.01306, equation 8; the estimate of z_0 in section 4.1.

Shapes: G judged answers, M mismatched ones. Units: log-ratios in nats.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tunesmith.engine.logprobs import Logprobs
from tunesmith.objectives.base import Objective, Result, Sum
from tunesmith.objectives.labels import class_weight_G, label_metrics, labeled_of, one_unit


def kto_loss(logratio_G: Tensor, sign_G: Tensor, weight_G: Tensor, *, baseline: Tensor, beta: float = 0.1) -> Tensor:
    """Loss of each answer, [G]: lambda_y - v(x, y) of equation 8, Ethayarajh et al. 2024 (arXiv:2402.01306).

    logratio_G: log pi/pi_ref of whole answers; sign_G: 1 desirable, -1 undesirable; weight_G: lambda_D or lambda_U;
    baseline: z_0, the policy's drift from the reference in nats, a scalar without gradient.
    """
    return weight_G * torch.sigmoid(-beta * sign_G * (logratio_G - baseline))  # lambda (1 - sigmoid(x))


def drift(mismatched_M: Tensor) -> Tensor:
    """z_0: the mean log-ratio of answers on prompts of other rows, at least 0, a scalar without gradient.

    Differs: the mean is over the whole step; the paper's (and TRL's) is over a micro-batch of one device.
    """
    assert len(mismatched_M), "KTO's trees hold a mismatched answer each"
    return mismatched_M.detach().mean().clamp(min=0)


def kto(beta: float, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> Objective:
    """The objective over trees of a judged and a mismatched answer; one unit a tree. All trees share the drift."""

    def function(logprobs: Logprobs) -> Result:
        answers = labeled_of(logprobs)
        baseline = drift(answers.mismatched_M)
        weight_G = class_weight_G(answers, desirable_weight, undesirable_weight)
        loss_G = kto_loss(answers.logratio_G, answers.sign_G, weight_G, baseline=baseline, beta=beta)
        with torch.no_grad():
            metrics = label_metrics(answers, beta, beta * baseline) | {"kl": Sum(baseline, 1.0)}
        return Result(Sum(loss_G.sum(), float(len(loss_G))), metrics)

    return Objective("kto", function, one_unit, num_answers=2, needs_reference=True, separable=False)
