"""What the paired methods share: the figures of a pair, what a recipe may change about them, and the metrics.

In: log-probs of both answers, and a method's loss of a pair. Out: the objective that the loop calls.
Must not know: models, tokens, which methods there are.

A method is a pure function from `Pairs` to a loss [P]; everything else (weights of pairs and tokens, an added SFT term,
the metrics, the counting) is done here, once for all of them.

Shapes: N trained tokens, B branches, P pairs, K = 2 answers of a pair, the chosen one first. Units: nats.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tunesmith.data.types import Tree
from tunesmith.engine.logprobs import Logprobs
from tunesmith.objectives.base import Carrying, Objective, Result, Sum
from tunesmith.objectives.wpo import wpo_weights


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """A step's pairs: log-probs summed over each answer's trained tokens, and how many those are.

    policy_PK, reference_PK: under the policy and the reference (None for methods without one); tokens_PK: counts.
    score_PK: the rows' scores of the answers, where they have any.
    """

    policy_PK: Tensor
    reference_PK: Tensor | None
    tokens_PK: Tensor
    score_PK: Tensor | None = None

    @property
    def logratio_PK(self) -> Tensor:
        """Policy - reference, of whole answers; the policy's own log-probs where there is no reference."""
        return self.policy_PK if self.reference_PK is None else self.policy_PK - self.reference_PK

    @property
    def mean_logratio_PK(self) -> Tensor:
        """The same per token."""
        return self.logratio_PK / self.tokens_PK

    @property
    def mean_PK(self) -> Tensor:
        """The policy's log-prob per token."""
        return self.policy_PK / self.tokens_PK


Loss = Callable[[Pairs], Tensor]
"""Loss of each pair, [P]."""


@dataclass(frozen=True, slots=True)
class PairOptions:
    """What a recipe may change about any paired method; see the keys of the same names in `recipe.preferences`."""

    sft_weight: float = 0.0
    pair_weights: bool = False
    length_desensitization: float = 1.0
    wpo: bool = False


PLAIN = PairOptions()


def pairs_of(logprobs: Logprobs, *, alpha: float = 1.0) -> Pairs:
    """The pairs of a step; tokens of the longer answer beyond the shorter one's length count `alpha` (LD-DPO)."""
    tokens_PK = logprobs.per_branch(torch.ones_like(logprobs.logprob_N.detach())).view(-1, 2)
    weight_N = None if alpha == 1 else _desensitized(logprobs, tokens_PK, alpha)

    def summed(values_N: Tensor) -> Tensor:
        return logprobs.per_branch(values_N if weight_N is None else values_N * weight_N).view(-1, 2)

    reference_PK = None if logprobs.reference_N is None else summed(logprobs.reference_N)
    score_PK = None if logprobs.score_B is None else logprobs.score_B.view(-1, 2)
    return Pairs(summed(logprobs.logprob_N), reference_PK, tokens_PK, score_PK)


def _desensitized(logprobs: Logprobs, tokens_PK: Tensor, alpha: float) -> Tensor:
    """1 for each token up to the shorter answer's length, alpha behind it, [N] (Liu et al. 2024, arXiv:2409.06411)."""
    tokens_B = tokens_PK.reshape(-1)
    shorter_B = tokens_PK.min(-1).values.repeat_interleave(2)
    first_B = tokens_B.cumsum(0) - tokens_B
    place_N = torch.arange(len(logprobs.branch_N), device=tokens_B.device) - first_B[logprobs.branch_N]
    return torch.ones_like(place_N, dtype=tokens_B.dtype).masked_fill(place_N >= shorter_B[logprobs.branch_N], alpha)


def pair_metrics(pairs: Pairs, beta: float) -> dict[str, Sum]:
    """Figures per pair; rewards are beta * (policy - reference), and without a reference beta * policy per token.

    `logratio` is on the data's answers and is not a KL.
    """
    count = float(len(pairs.policy_PK))
    has_reference = pairs.reference_PK is not None
    reward_PK = beta * (pairs.logratio_PK if has_reference else pairs.mean_PK)
    margin_P = reward_PK[:, 0] - reward_PK[:, 1]
    wins_P = (margin_P > 0).float() + 0.5 * (margin_P == 0).float()  # a tie is half a win
    columns = {
        "reward_chosen": reward_PK[:, 0],
        "reward_rejected": reward_PK[:, 1],
        "margin": margin_P,
        "accuracy": wins_P,
    }
    if has_reference:
        columns |= {"logratio_chosen": pairs.logratio_PK[:, 0], "logratio_rejected": pairs.logratio_PK[:, 1]}
    columns |= {
        "logprob_chosen": pairs.policy_PK[:, 0],
        "logprob_rejected": pairs.policy_PK[:, 1],
        "tokens_chosen": pairs.tokens_PK[:, 0],
        "tokens_rejected": pairs.tokens_PK[:, 1],
    }
    return {name: Sum(column.sum(), count) for name, column in columns.items()}


def reward_metrics(reward_PK: Tensor, tokens_PK: Tensor) -> Mapping[str, Sum]:
    """Rewards, margin and accuracy of a method whose rewards, [P, K], are its own: per token, or of another shape."""
    found = pair_metrics(Pairs(reward_PK, torch.zeros_like(reward_PK), tokens_PK), beta=1.0)
    return {name: found[name] for name in ("reward_chosen", "reward_rejected", "margin", "accuracy")}


def paired(
    name: str,
    loss: Loss,
    *,
    beta: float,
    options: PairOptions = PLAIN,
    needs_reference: bool = True,
    separable: bool = True,
    more_metrics: Callable[[Pairs], Mapping[str, Sum]] = lambda pairs: {},
) -> Objective:
    """The objective of a paired method, over trees of two branches, chosen first.

    One unit a pair, or with `pair_weights` the pair's weight. `beta` scales the rewards of the metrics. `separable`:
    the loss of a pair does not depend on the step's other pairs.
    """

    def function(logprobs: Logprobs) -> Result:
        assert (logprobs.reference_N is not None) == needs_reference
        pairs = pairs_of(logprobs, alpha=options.length_desensitization)
        loss_P = loss(pairs)
        if options.sft_weight:  # of the whole answer, whatever `length_desensitization` makes of its end
            chosen_P = logprobs.per_branch().view(-1, 2)[:, 0]
            loss_P = loss_P - options.sft_weight * chosen_P / pairs.tokens_PK[:, 0]
        if options.wpo:
            loss_P = loss_P * wpo_weights(logprobs)
        weight_P = logprobs.weight_G if options.pair_weights else None
        count = float(loss_P.numel()) if weight_P is None else float(weight_P.sum())
        total = loss_P.sum() if weight_P is None else (loss_P * weight_P).sum()
        with torch.no_grad():
            metrics = pair_metrics(pairs, beta) | dict(more_metrics(pairs))
            if options.length_desensitization != 1:  # rewards are as the loss sees them, log-probs as they are
                metrics |= _whole_logprobs(logprobs)
        return Result(Sum(total, count), metrics)

    return Objective(
        name,
        function,
        _weight if options.pair_weights else _one,
        num_answers=2,
        needs_reference=needs_reference,
        separable=separable,
        wants=("collision",) if options.wpo else (),
    )


def _whole_logprobs(logprobs: Logprobs) -> dict[str, Sum]:
    policy_PK = logprobs.per_branch().view(-1, 2)
    names = ("logprob_chosen", "logprob_rejected")
    return {name: Sum(policy_PK[:, column].sum(), float(len(policy_PK))) for column, name in enumerate(names)}


def carried(objective: Objective, carrying: Carrying) -> Objective:
    """The objective with something that it carries from step to step."""
    return replace(objective, carrying=carrying)


def _one(tree: Tree) -> float:
    return 1


def _weight(tree: Tree) -> float:
    return tree.weight
