"""What the listwise methods share: the answers of a prompt side by side, who competes with whom, and the metrics.

In: log-probs of trees with a score for every answer, and a method's loss of a row. Out: the objective.
Must not know: models, tokens, which methods there are.

Shapes: N trained tokens, B branches, G rows, K the most answers that a row of the step has. Units: nats.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tunesmith.data.types import Tree
from tunesmith.engine.logprobs import Logprobs
from tunesmith.objectives.base import Objective, Result, Sum


@dataclass(frozen=True, slots=True, eq=False)
class Rankings:
    """A step's rows. is_answer_GK: where a row has an answer; elsewhere the other figures are 0.

    logratio_GK: policy - reference of whole answers; logprob_GK: the policy's; tokens_GK: how many are trained.
    """

    logratio_GK: Tensor
    logprob_GK: Tensor
    tokens_GK: Tensor
    score_GK: Tensor
    is_answer_GK: Tensor

    @property
    def beats_GKK(self) -> Tensor:
        """[g, i, j]: answer i of row g has a higher score than answer j."""
        both_GKK = self.is_answer_GK[:, :, None] & self.is_answer_GK[:, None, :]
        return both_GKK & (self.score_GK[:, :, None] > self.score_GK[:, None, :])

    @property
    def is_best_GK(self) -> Tensor:
        """Which answers nobody beats; several where the highest scores are equal."""
        return self.is_answer_GK & ~self.beats_GKK.any(1)

    @property
    def is_worst_GK(self) -> Tensor:
        """Which answers beat nobody."""
        return self.is_answer_GK & ~self.beats_GKK.any(2)


Loss = Callable[[Rankings], Tensor]
"""Loss of each row, [G]."""


def rankings_of(logprobs: Logprobs) -> Rankings:
    """The rows of a step: branches of a tree side by side, in the file's order."""
    assert logprobs.reference_N is not None and logprobs.score_B is not None
    tree_B = logprobs.tree_B.to(logprobs.logprob_N.device)
    number_G = torch.bincount(tree_B)
    place_B = torch.arange(len(tree_B), device=tree_B.device) - (number_G.cumsum(0) - number_G)[tree_B]
    shape = (len(number_G), int(number_G.max()))

    def rows(values_B: Tensor) -> Tensor:
        return values_B.new_zeros(shape).index_put((tree_B, place_B), values_B)

    logprob_B = logprobs.per_branch()
    tokens_B = logprobs.per_branch(torch.ones_like(logprobs.logprob_N.detach()))
    return Rankings(
        rows(logprob_B - logprobs.per_branch(logprobs.reference_N)),
        rows(logprob_B),
        rows(tokens_B),
        rows(logprobs.score_B),
        rows(torch.ones_like(tree_B, dtype=torch.bool)),
    )


def choice_loss(reward_GK: Tensor, beats_GKK: Tensor) -> Tensor:
    """-log of each answer's share of the softmax over itself and the answers that it beats, [G, K].

    0 for an answer that beats nobody, so also where a row has no answer.
    """
    self_KK = torch.eye(reward_GK.shape[1], dtype=torch.bool, device=reward_GK.device)
    rivals_GKK = reward_GK[:, None, :].expand(beats_GKK.shape).masked_fill(~(beats_GKK | self_KK), -torch.inf)
    return rivals_GKK.logsumexp(-1) - reward_GK


def ranking_metrics(rows: Rankings, beta: float) -> dict[str, Sum]:
    """Figures per row; rewards are beta * (policy - reference), chosen is the best answer, rejected the worst.

    Where several are best or worst it is their mean. accuracy: of the pairs of answers with unequal scores, the share
    that the rewards order in the same way; a tie of rewards is half.
    """
    reward_GK = beta * rows.logratio_GK
    beats_GKK = rows.beats_GKK
    ahead_GKK = reward_GK[:, :, None] - reward_GK[:, None, :]
    right_GKK = (ahead_GKK > 0).float() + 0.5 * (ahead_GKK == 0).float()
    count = float(len(reward_GK))

    def of(values_GK: Tensor, chosen_GK: Tensor) -> Tensor:
        return (values_GK * chosen_GK).sum(-1) / chosen_GK.sum(-1)

    metrics = {}
    for prefix, values_GK in (("reward", reward_GK), ("logratio", rows.logratio_GK), ("logprob", rows.logprob_GK)):
        metrics[f"{prefix}_chosen"] = Sum(of(values_GK, rows.is_best_GK).sum(), count)
        metrics[f"{prefix}_rejected"] = Sum(of(values_GK, rows.is_worst_GK).sum(), count)
    metrics["tokens_chosen"] = Sum(of(rows.tokens_GK, rows.is_best_GK).sum(), count)
    metrics["tokens_rejected"] = Sum(of(rows.tokens_GK, rows.is_worst_GK).sum(), count)
    metrics["margin"] = Sum(metrics["reward_chosen"].total - metrics["reward_rejected"].total, count)
    metrics["accuracy"] = Sum((right_GKK * beats_GKK).sum(), float(beats_GKK.sum()))
    return metrics


def ranked(name: str, loss: Loss, *, beta: float) -> Objective:
    """The objective of a listwise method, over trees with a score for every branch; one unit a row."""

    def function(logprobs: Logprobs) -> Result:
        rows = rankings_of(logprobs)
        loss_G = loss(rows)
        with torch.no_grad():
            metrics = ranking_metrics(rows, beta)
        return Result(Sum(loss_G.sum(), float(len(loss_G))), metrics)

    # as many answers as the row has, which is what 0 means in the formats, too
    return Objective(name, function, _one, num_answers=0, needs_reference=True)


def _one(tree: Tree) -> float:
    return 1
