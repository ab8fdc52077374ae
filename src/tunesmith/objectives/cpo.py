"""Contrastive preference optimization: DPO whose reference is uniform, with SFT on the chosen answer.

In: the figures of pairs. Out: the loss of each. Must not know: models, tokens.

Source: Xu et al. 2024, arXiv:2401.08417, equation 3 (DPO's loss under a uniform reference) and the sum with the
negative log-likelihood of the chosen answer that section 3 ends in.

Shapes: P pairs, K = 2. Units: summed log-probs in nats.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.nn.functional import logsigmoid

from tunesmith.objectives.base import Objective, Sum
from tunesmith.objectives.pairs import PLAIN, PairOptions, Pairs, paired, reward_metrics


def cpo_loss(chosen_P: Tensor, rejected_P: Tensor, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """Preference term of each pair, [P], from the summed log-probs of its answers, each [P].

    -log sigmoid(beta * (chosen - rejected)); label_smoothing in [0, 0.5) is the assumed share of flipped pairs.
    """
    logits_P = beta * (chosen_P - rejected_P)
    return -logsigmoid(logits_P) * (1 - label_smoothing) - logsigmoid(-logits_P) * label_smoothing


def cpo(beta: float, label_smoothing: float = 0.0, *, options: PairOptions = PLAIN) -> Objective:
    """The objective over trees of two branches, chosen first; one unit a pair.

    Differs: the SFT term, whose weight is `options.sft_weight`, is the mean over the chosen answer's tokens, pair by
    pair; the paper's is their sum.
    """

    def loss(pairs: Pairs) -> Tensor:
        return cpo_loss(pairs.policy_PK[:, 0], pairs.policy_PK[:, 1], beta=beta, label_smoothing=label_smoothing)

    def metrics(pairs: Pairs) -> Mapping[str, Sum]:
        return reward_metrics(beta * pairs.policy_PK, pairs.tokens_PK)

    return paired("cpo", loss, beta=beta, options=options, needs_reference=False, more_metrics=metrics)
