"""Direct preference optimization: chosen over rejected, measured against a reference.

In: the figures of pairs. Out: the loss of each. Must not know: models, tokens, where the reference came from.

Source: Rafailov et al. 2023, arXiv:2305.18290, equation 7; label smoothing: Mitchell 2023, "A note on DPO with
noisy preferences", equation 3 (conservative DPO).

Shapes: P pairs. Units: log-probs and rewards in nats.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from tunesmith.objectives.base import Objective
from tunesmith.objectives.pairs import PLAIN, PairOptions, Pairs, paired


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


def dpo(beta: float, label_smoothing: float = 0.0, *, options: PairOptions = PLAIN) -> Objective:
    """The objective over trees of two branches, chosen first; one unit a pair."""

    def loss(pairs: Pairs) -> Tensor:
        assert pairs.reference_PK is not None
        policy_PK, reference_PK = pairs.policy_PK, pairs.reference_PK
        return dpo_loss(
            policy_PK[:, 0],
            policy_PK[:, 1],
            reference_PK[:, 0],
            reference_PK[:, 1],
            beta=beta,
            label_smoothing=label_smoothing,
        )

    return paired("dpo", loss, beta=beta, options=options)
