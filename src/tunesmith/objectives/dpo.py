"""Direct preference optimization: chosen over rejected, measured against a reference.

In: log-probs of both answers under the policy and the reference. Out: loss and metrics as (sum, count).
Must not know: models, tokens, where the reference came from.

Source: Rafailov et al. 2023, arXiv:2305.18290, equation 7; label smoothing: Mitchell 2023, "A note on DPO with
noisy preferences", equation 3 (conservative DPO).

Shapes: N trained tokens, B branches, P pairs. Units: log-probs and rewards in nats.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tunesmith.data.types import Tree
from tunesmith.engine.logprobs import Logprobs
from tunesmith.objectives.base import Objective, Result, Sum


def dpo_loss(
    chosen_P: Tensor,
    rejected_P: Tensor,
    reference_chosen_P: Tensor,
    reference_rejected_P: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Loss of each pair, [P], from the summed log-probs of its answers, each [P].

    beta > 0 scales the implicit reward `beta * (policy - reference)`; label_smoothing in [0, 0.5) is the
    assumed share of flipped pairs. Without it this is -log sigmoid(beta * margin of log-ratios).
    """
    logits_P = beta * ((chosen_P - reference_chosen_P) - (rejected_P - reference_rejected_P))
    return -logsigmoid(logits_P) * (1 - label_smoothing) - logsigmoid(-logits_P) * label_smoothing


def _metrics(policy_PK: Tensor, reference_PK: Tensor, *, beta: float, num_tokens_PK: Tensor) -> dict[str, Sum]:
    """Figures per pair, K = 2 (chosen, rejected); `logratio` is on the data's answers and is not a KL."""
    count = float(policy_PK.shape[0])
    logratio_PK = policy_PK - reference_PK
    reward_PK = beta * logratio_PK
    margin_P = reward_PK[:, 0] - reward_PK[:, 1]
    wins_P = (margin_P > 0).float() + 0.5 * (margin_P == 0).float()  # a tie is half a win
    columns = {
        "reward_chosen": reward_PK[:, 0],
        "reward_rejected": reward_PK[:, 1],
        "margin": margin_P,
        "accuracy": wins_P,
        "logratio_chosen": logratio_PK[:, 0],
        "logratio_rejected": logratio_PK[:, 1],
        "logprob_chosen": policy_PK[:, 0],
        "logprob_rejected": policy_PK[:, 1],
        "tokens_chosen": num_tokens_PK[:, 0],
        "tokens_rejected": num_tokens_PK[:, 1],
    }
    return {name: Sum(column.sum(), count) for name, column in columns.items()}


def dpo(beta: float, label_smoothing: float = 0.0) -> Objective:
    """The objective over trees of two branches, chosen first; one unit a pair."""

    def function(logprobs: Logprobs) -> Result:
        assert logprobs.reference_N is not None
        policy_PK = logprobs.per_branch().view(-1, 2)
        reference_PK = logprobs.per_branch(logprobs.reference_N).view(-1, 2)
        loss_P = dpo_loss(
            policy_PK[:, 0],
            policy_PK[:, 1],
            reference_PK[:, 0],
            reference_PK[:, 1],
            beta=beta,
            label_smoothing=label_smoothing,
        )
        with torch.no_grad():
            ones_N = torch.ones_like(logprobs.reference_N)
            lengths_PK = logprobs.per_branch(ones_N).view(-1, 2)
            metrics = _metrics(policy_PK, reference_PK, beta=beta, num_tokens_PK=lengths_PK)
        return Result(Sum(loss_P.sum(), float(loss_P.numel())), metrics)

    return Objective("dpo", function, _one_pair, num_answers=2, needs_reference=True)


def _one_pair(tree: Tree) -> int:
    return 1
