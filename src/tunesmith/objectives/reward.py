"""A reward model: the chosen answer's score above the rejected one's.

In: the scores of both answers of a pair, each read at the answer's last token. Out: the loss of each pair, and how well
the scores tell the better answer, calibration included. Must not know: models, tokens, where a score is read.

Source: Bradley and Terry 1952, as Ouyang et al. 2022, arXiv:2203.02155, use it; margins: Touvron et al. 2023,
arXiv:2307.09288, section 3.2.2; centering: Eisenstein et al. 2023, arXiv:2312.09244, the regularizer of equation 2.

Shapes: P pairs, K = 2 answers of a pair, the chosen one first. Units: a score is in nats, since the sigmoid of a
difference of scores is a probability.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tunesmith.data.types import Tree
from tunesmith.engine.logprobs import Logprobs
from tunesmith.errors import DataError
from tunesmith.objectives.base import Objective, Result, Sum

EDGES = (0.5, 0.6, 0.7, 0.8, 0.9)
"""Lower edges of the bins of confidence; the last one ends at 1."""


def reward_loss(
    chosen_P: Tensor, rejected_P: Tensor, *, margin_P: Tensor | None = None, centering: float = 0.0
) -> Tensor:
    """Loss of each pair, [P], from the scores of its answers, each [P].

    -log sigmoid(chosen - rejected - margin) + centering * (chosen + rejected)^2. `margin_P`: by how much the chosen
    answer must win; `centering` draws the scores of a pair, which the first term leaves free to move together, to 0.
    """
    difference_P = chosen_P - rejected_P
    if margin_P is not None:
        difference_P = difference_P - margin_P
    loss_P = -logsigmoid(difference_P)
    return loss_P + centering * (chosen_P + rejected_P).square() if centering else loss_P


def reward_metrics(score_PK: Tensor) -> dict[str, Sum]:
    """Figures per pair. brier: squared distance of the probability that the chosen answer wins from 1."""
    count = float(len(score_PK))
    margin_P = score_PK[:, 0] - score_PK[:, 1]
    wins_P = (margin_P > 0).float() + 0.5 * (margin_P == 0).float()  # a tie is half a win
    columns = {
        "reward_chosen": score_PK[:, 0],
        "reward_rejected": score_PK[:, 1],
        "margin": margin_P,
        "accuracy": wins_P,
        "brier": (-margin_P).sigmoid().square(),
    }
    return {name: Sum(column.sum(), count) for name, column in columns.items()}


def calibration(margin_P: Tensor) -> dict[str, Sum]:
    """Whether the probabilities are what they say: of the pairs where the preferred answer's is 60 to 70 %, say, it is
    the chosen one in 60 to 70 %.

    calibration_error: the expected one (Guo et al. 2017, arXiv:1706.04599, equation 3), over bins of confidence; of
    bin 60, say, `confidence_60` is the mean probability and `accuracy_60` the share of right ones, each nan where the
    bin is empty, and `share_60` the share of all pairs that are in it.
    """
    confidence_P = margin_P.abs().sigmoid()
    wins_P = (margin_P > 0).to(margin_P) + 0.5 * (margin_P == 0).to(margin_P)
    bin_P = torch.bucketize(confidence_P, torch.tensor(EDGES[1:], device=margin_P.device), right=True)
    found: dict[str, Sum] = {}
    error = margin_P.new_zeros(())
    for number, edge in enumerate(EDGES):
        inside_P = bin_P == number
        right, sure, count = wins_P[inside_P].sum(), confidence_P[inside_P].sum(), float(inside_P.sum())
        error = error + (right - sure).abs()
        percent = f"{100 * edge:.0f}"
        found[f"confidence_{percent}"] = Sum(sure, count)
        found[f"accuracy_{percent}"] = Sum(right, count)
        found[f"share_{percent}"] = Sum(inside_P.to(margin_P).sum(), float(len(margin_P)))
    return {"calibration_error": Sum(error, float(len(margin_P))), **found}


def reward(*, margins: bool = False, centering: float = 0.0) -> Objective:
    """The objective over trees of two branches, chosen first, each with one score; one unit a pair.

    `margins`: the chosen answer must win by the difference of its row's scores.
    """

    def function(logprobs: Logprobs) -> Result:
        score_PK = logprobs.per_branch().view(-1, 2)
        margin_P = _margins(logprobs) if margins else None
        loss_P = reward_loss(score_PK[:, 0], score_PK[:, 1], margin_P=margin_P, centering=centering)
        with torch.no_grad():
            metrics = reward_metrics(score_PK)
        return Result(Sum(loss_P.sum(), float(loss_P.numel())), metrics)

    return Objective("reward", function, _one, num_answers=2, reads_score=True, evaluated=_with_calibration(function))


def _with_calibration(function: Callable[[Logprobs], Result]) -> Callable[[Logprobs], Result]:
    """The same with figures that only many pairs can tell."""

    def evaluated(logprobs: Logprobs) -> Result:
        result = function(logprobs)
        with torch.no_grad():
            score_PK = logprobs.per_branch().view(-1, 2)
            more = calibration(score_PK[:, 0] - score_PK[:, 1])
        return Result(result.loss, {**result.metrics, **more})

    return evaluated


def _margins(logprobs: Logprobs) -> Tensor:
    if logprobs.score_B is None:
        raise DataError(
            "`margin: scores` needs the scores of both answers, and not all rows have them",
            where="stage reward",
            remedy="Give every row `chosen_score` and `rejected_score` (or `margin`), or set `margin: none`.",
        )
    score_PK = logprobs.score_B.view(-1, 2)
    return score_PK[:, 0] - score_PK[:, 1]


def _one(tree: Tree) -> float:
    return 1
