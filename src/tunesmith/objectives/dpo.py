"""Direct preference optimization: chosen over rejected, measured against a reference.

In: the figures of pairs. Out: the loss of each. Must not know: models, tokens, where the reference came from.

Source: Rafailov et al. 2023, arXiv:2305.18290, equation 7; label smoothing: Mitchell 2023, "A note on DPO with
noisy preferences", equation 3 (conservative DPO); other divergences: Wang et al. 2023, arXiv:2309.16240 (f-DPO);
an offset: Amini et al. 2024, arXiv:2402.10571 (ODPO).

Shapes: P pairs. Units: log-probs and rewards in nats.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from tunesmith.errors import DataError
from tunesmith.objectives.base import Objective
from tunesmith.objectives.divergences import Divergence, divergence_score
from tunesmith.objectives.pairs import PLAIN, PairOptions, Pairs, paired


def dpo_loss(
    chosen_P: Tensor,
    rejected_P: Tensor,
    reference_chosen_P: Tensor,
    reference_rejected_P: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    divergence: Divergence = "reverse_kl",
    divergence_alpha: float = 0.5,
    offset_P: Tensor | float = 0.0,
) -> Tensor:
    """Loss of each pair, [P], from the summed log-probs of its answers, each [P].

    beta > 0 scales the implicit reward `beta * (policy - reference)`; label_smoothing in [0, 0.5) is the
    assumed share of flipped pairs. Without it this is -log sigmoid(beta * margin of log-ratios - offset).
    divergence: what stands for the log-ratio (`divergence_score`); offset_P: nats by which the margin must exceed 0.
    """
    chosen_score_P = divergence_score(chosen_P - reference_chosen_P, divergence, alpha=divergence_alpha)
    rejected_score_P = divergence_score(rejected_P - reference_rejected_P, divergence, alpha=divergence_alpha)
    logits_P = beta * (chosen_score_P - rejected_score_P) - offset_P
    return -logsigmoid(logits_P) * (1 - label_smoothing) - logsigmoid(-logits_P) * label_smoothing


def score_offset(pairs: Pairs, scale: float) -> Tensor | float:
    """Nats by which each pair's margin must exceed 0, [P]: ODPO's offset, `scale` times the difference of the scores.

    Differs: the paper scales the difference by an increasing function, in its authors' code always the logarithm; here
    it stays as it is. For the logarithm, give the rows that as their `margin`.
    Raises DataError where a row has no scores.
    """
    if not scale:
        return 0.0
    if pairs.score_PK is None:
        raise DataError(
            "`margin: scores` needs a score of both answers in every row, and some row of this step has none.",
            remedy="Give every row its scores, or set `margin: none`.",
        )
    return scale * (pairs.score_PK[:, 0] - pairs.score_PK[:, 1])


def dpo(
    beta: float,
    label_smoothing: float = 0.0,
    *,
    divergence: Divergence = "reverse_kl",
    divergence_alpha: float = 0.5,
    margin_scale: float = 0.0,
    options: PairOptions = PLAIN,
) -> Objective:
    """The objective over trees of two branches, chosen first; one unit a pair. margin_scale above 0: ODPO."""

    def loss(pairs: Pairs) -> Tensor:
        assert pairs.reference_PK is not None
        return dpo_loss(
            *pairs.policy_PK.unbind(-1),
            *pairs.reference_PK.unbind(-1),
            beta=beta,
            label_smoothing=label_smoothing,
            divergence=divergence,
            divergence_alpha=divergence_alpha,
            offset_P=score_offset(pairs, margin_scale),
        )

    return paired("dpo", loss, beta=beta, options=options)
