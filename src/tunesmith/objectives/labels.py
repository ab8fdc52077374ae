"""What the methods share that learn from single answers with a label: the figures of an answer, and the metrics.

In: log-probs of trees with a label, whose first branch is the answer. Out: figures a method reads; metrics.
Must not know: models, tokens, which methods there are.

Shapes: N trained tokens, B branches, G trees (answers that are judged), M mismatched answers. Units: nats.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tunesmith.data.types import Tree
from tunesmith.engine.logprobs import Logprobs
from tunesmith.objectives.base import Sum


@dataclass(frozen=True, slots=True, eq=False)
class Labeled:
    """A step's judged answers. logratio_G: policy - reference of whole answers, with gradient; logprob_G: the
    policy's; is_desirable_G: their labels; mismatched_M: log-ratios, without gradient, of the answers that stand
    beside them on a prompt that is not their own."""

    logratio_G: Tensor
    logprob_G: Tensor
    is_desirable_G: Tensor
    mismatched_M: Tensor

    @property
    def sign_G(self) -> Tensor:
        """1 for desirable answers, -1 for others."""
        return torch.where(self.is_desirable_G, 1.0, -1.0).to(self.logratio_G.dtype)


def labeled_of(logprobs: Logprobs) -> Labeled:
    """The judged answers of a step: the first branch of each tree; further ones are mismatched."""
    assert logprobs.reference_N is not None and logprobs.label_G is not None
    assert not bool(logprobs.label_G.isnan().any()), "every tree of these methods has a label"
    logprob_B = logprobs.per_branch()
    logratio_B = logprob_B - logprobs.per_branch(logprobs.reference_N)
    is_answer_B = torch.ones_like(logprobs.tree_B, dtype=torch.bool)
    is_answer_B[1:] = logprobs.tree_B[1:] != logprobs.tree_B[:-1]
    return Labeled(
        logratio_B[is_answer_B],
        logprob_B[is_answer_B],
        (logprobs.label_G == 1).to(logprob_B.device),
        logratio_B[~is_answer_B].detach(),
    )


def class_weight_G(answers: Labeled, desirable: float, undesirable: float) -> Tensor:
    """Weight of each answer, [G], by its label."""
    is_desirable_G = answers.is_desirable_G.to(answers.logratio_G.dtype)
    return desirable * is_desirable_G + undesirable * (1 - is_desirable_G)


def label_metrics(answers: Labeled, beta: float, baseline: Tensor) -> dict[str, Sum]:
    """Figures per answer; rewards are beta * (policy - reference).

    margin: mean reward of the desirable answers less that of the others; accuracy: the share of the rewards that lie on
    the label's side of `baseline` (a reward), a tie is half. A step without an answer of one label has no margin, and
    no mean of its reward.
    """
    reward_G = beta * answers.logratio_G
    ahead_G = answers.sign_G * (reward_G - baseline)
    right_G = (ahead_G > 0).float() + 0.5 * (ahead_G == 0).float()
    count = float(len(reward_G))
    metrics = {}
    for name, chosen_G in (("desirable", answers.is_desirable_G), ("undesirable", ~answers.is_desirable_G)):
        number = float(chosen_G.sum())
        metrics[f"reward_{name}"] = Sum(reward_G[chosen_G].sum(), number)
        metrics[f"logprob_{name}"] = Sum(answers.logprob_G[chosen_G].sum(), number)
    one, other = metrics["reward_desirable"], metrics["reward_undesirable"]
    both = float(one.count > 0 and other.count > 0)
    margin = one.total / max(one.count, 1) - other.total / max(other.count, 1)
    return metrics | {"margin": Sum(margin * both, both), "accuracy": Sum(right_G.sum(), count)}


def one_unit(tree: Tree) -> float:
    """Every judged answer counts once, whatever its label's weight is."""
    return 1
