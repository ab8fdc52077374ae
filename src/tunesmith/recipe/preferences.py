"""The preference stages: one class a method, with its settings. A class that sets no beta has DPO's 0.1, also where its
paper took less (NCA, BCO, robust DPO: 0.01; RSO's hinge, TR-DPO: 0.05).

In: plain values. Out: frozen, checked settings. Must not know: files, models, what a method computes
(`tunesmith.objectives` does, and `docs/methods.md` says it in equations).
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from tunesmith.recipe.stages import RowKind, Samples, StageBase
from tunesmith.recipe.values import Share, Steps, Strict


class PreferenceStage(StageBase):
    """What all stages have that learn from preferences."""

    rows: ClassVar[RowKind] = "pairs"

    learning_rate: float = Field(5e-6, gt=0)
    """Peak learning rate. Preference methods diverge at the rates that suit SFT; 5e-6 is safe with LoRA."""
    kl_budget: float = Field(10.0, gt=0)
    """Nats an answer by which sampled answers may leave the starting policy before it is said (`on_diagnosis`)."""


class PairedStage(PreferenceStage):
    """A chosen and a rejected answer to one prompt."""

    sft_weight: float = Field(0.0, ge=0)
    """Adds this times the chosen answer's negative log-likelihood per token to the loss of its pair, which keeps the
    chosen answer likely (RPO, Pang et al. 2024); 0: nothing is added."""
    pair_weights: Literal["none", "rows"] = "none"
    """rows: a pair counts as much as its row's `weight` says; none: all count alike."""


class ReferenceUpdate(Strict):
    """A reference that follows the policy (TR-DPO, Gorbatovski et al. 2024)."""

    mode: Literal["soft", "hard"] = "soft"
    """soft: reference = alpha * policy + (1 - alpha) * reference; hard: the reference becomes the policy."""
    alpha: Share = Field(0.6, gt=0, le=1)
    """Share of the policy in a soft update."""
    every: Steps = Field(512, ge=1)
    """Steps between updates."""


class ReferenceStage(PairedStage):
    """A pair, judged against the policy at the stage's start."""

    beta: float = Field(0.1, gt=0)
    """How strongly the policy is held to the reference: higher holds it closer."""
    length_desensitization: Share = Field(1.0, ge=0, le=1)
    """What the tokens of the longer answer beyond the shorter one's length count (LD-DPO's alpha, Liu et al. 2024);
    1: as much as the others."""
    weighting: Literal["none", "wpo"] = "none"
    """wpo: a pair counts as much as the policy would have written its answers (WPO, Zhou et al. 2024)."""
    reference_update: ReferenceUpdate | None = None
    """Moves the reference during the stage (TR-DPO); null: it stays as it was at the start."""


class DpoStage(ReferenceStage):
    """Direct preference optimization (Rafailov et al. 2023)."""

    method: Literal["dpo"] = "dpo"
    """Chosen over rejected, against the policy at the stage's start."""
    label_smoothing: Share = Field(0.0, ge=0, lt=0.5)
    """Assumed share of flipped preferences (conservative DPO)."""
    divergence: Literal["reverse_kl", "forward_kl", "jensen_shannon", "alpha"] = "reverse_kl"
    """What keeps the policy near the reference (f-DPO, Wang et al. 2023); reverse_kl is plain DPO."""
    divergence_alpha: float = Field(0.5, gt=0, lt=1)
    """Alpha of the alpha divergence: towards 0 it is the reverse KL, towards 1 the forward KL."""
    margin: Literal["none", "scores"] = "none"
    """scores: the chosen answer must win by `margin_scale` times the difference of its row's scores (ODPO's offset,
    Amini et al. 2024); none: by anything."""
    margin_scale: float = Field(1.0, gt=0)
    """Nats of margin for one unit of the scores."""


class RobustDpoStage(ReferenceStage):
    """DPO that is unbiased under flipped preferences (Chowdhury et al. 2024)."""

    method: Literal["robust_dpo"] = "robust_dpo"
    """DPO corrected for a known share of flipped pairs."""
    label_smoothing: Share = Field(0.1, gt=0, lt=0.5)
    """Share of flipped preferences in the data."""


class HingeStage(ReferenceStage):
    """Hinge loss on the margin (SLiC, Zhao et al. 2023, as in RSO, Liu et al. 2023)."""

    method: Literal["hinge"] = "hinge"
    """Pairs count until their margin is 1."""


class IpoStage(ReferenceStage):
    """Identity preference optimization (Azar et al. 2023)."""

    method: Literal["ipo"] = "ipo"
    """The margin is drawn to 1 / (2 beta), not to infinity."""
    normalization: Literal["mean", "sum"] = "mean"
    """mean: log-ratios per token of an answer, as the authors confirmed; sum: of whole answers, as the paper's
    equation 17 reads."""


class ExoStage(ReferenceStage):
    """Efficient exact optimization (Ji et al. 2024), on pairs."""

    method: Literal["exo"] = "exo"
    """Reverse KL between the policy's preference and the data's."""
    label_smoothing: Share = Field(1e-3, gt=0, lt=0.5)
    """The data's preference for the rejected answer; the logarithm needs it above 0."""


class NcaStage(ReferenceStage):
    """Noise contrastive alignment (Chen et al. 2024), on pairs."""

    method: Literal["nca"] = "nca"
    """Raises the chosen answer's own likelihood, not only the margin."""


class BcoStage(ReferenceStage):
    """Binary classifier optimization (Jung et al. 2024), on pairs."""

    method: Literal["bco"] = "bco"
    """Each answer is classified against the mean reward so far."""


class SppoStage(ReferenceStage):
    """Self-play preference optimization (Wu et al. 2024), with hard preferences."""

    method: Literal["sppo"] = "sppo"
    """Log-ratios are drawn to +1 / (2 beta) and -1 / (2 beta)."""
    beta: float = Field(1e-3, gt=0)
    """1 / eta of the paper, which uses eta = 1000."""


class AotStage(ReferenceStage):
    """Alignment via optimal transport (Melnyk et al. 2024), paired."""

    method: Literal["aot"] = "aot"
    """The distribution of the policy's margins is to dominate the reference's."""
    label_smoothing: Share = Field(0.0, ge=0, lt=0.5)
    """Share of the flipped comparison."""


class AotUnpairedStage(ReferenceStage):
    """Alignment via optimal transport (Melnyk et al. 2024), unpaired."""

    method: Literal["aot_unpaired"] = "aot_unpaired"
    """The distribution of chosen rewards is to dominate that of rejected ones."""
    label_smoothing: Share = Field(0.0, ge=0, lt=0.5)
    """Share of the flipped comparison."""


class ApoZeroStage(ReferenceStage):
    """Anchored preference optimization, zero (D'Oosterlinck et al. 2024)."""

    method: Literal["apo_zero"] = "apo_zero"
    """Chosen up, rejected down: for chosen answers better than the model's own."""


class ApoDownStage(ReferenceStage):
    """Anchored preference optimization, down (D'Oosterlinck et al. 2024)."""

    method: Literal["apo_down"] = "apo_down"
    """Both down, rejected more: for chosen answers worse than the model's own."""


class DiscopopStage(ReferenceStage):
    """DiscoPOP: log-ratio modulated loss (Lu et al. 2024)."""

    method: Literal["discopop"] = "discopop"
    """A loss that a language model discovered: logistic blended with exponential."""
    beta: float = Field(0.05, gt=0)
    """How strongly the policy is held to the reference."""
    temperature: float = Field(0.2, gt=0)
    """Width of the blend, in beta times nats of margin. The paper's 0.05 draws pairs of little margin the wrong way,
    into a local minimum that it names (so does all below 0.1023); a wider blend learns from the first step."""


class SigmoidNormStage(ReferenceStage):
    """Length-normalized DPO (Tulu 3, Lambert et al. 2024)."""

    method: Literal["sigmoid_norm"] = "sigmoid_norm"
    """DPO on log-ratios per token."""
    beta: float = Field(5.0, gt=0)
    """How strongly the policy is held to the reference, per token."""


class MixtureWeights(Strict):
    """How much each loss counts; the defaults are MPO's."""

    dpo: float = Field(0.8, ge=0)
    """Preference loss."""
    bco: float = Field(0.2, ge=0)
    """Quality loss: each answer against the mean reward so far."""
    sft: float = Field(1.0, ge=0)
    """Generation loss: the chosen answer's negative log-likelihood per token."""
    hinge: float = Field(0.0, ge=0)
    """Hinge loss."""
    ipo: float = Field(0.0, ge=0)
    """IPO's squared loss, length-normalized."""
    apo_zero: float = Field(0.0, ge=0)
    """APO-zero's loss."""


class MixtureStage(ReferenceStage):
    """Mixed preference optimization (MPO, Wang et al. 2024): a weighted sum of losses."""

    method: Literal["mixture"] = "mixture"
    """Several losses on the same pairs."""
    weights: MixtureWeights = Field(default_factory=MixtureWeights)
    """Weight of each loss."""


class OrpoStage(PairedStage):
    """Odds ratio preference optimization (Hong et al. 2024): SFT and preference in one, no reference."""

    method: Literal["orpo"] = "orpo"
    """SFT on the chosen answer plus a penalty on the rejected one's odds."""
    learning_rate: float = Field(8e-6, gt=0)
    """Peak learning rate; the authors advise 5e-6 to 2e-5, and trained Mistral at 5e-6."""
    beta: float = Field(0.1, ge=0)
    """Weight of the odds ratio (lambda of the paper)."""


class SimpoStage(PairedStage):
    """Simple preference optimization (Meng et al. 2024): mean log-probs, a target margin, no reference."""

    method: Literal["simpo"] = "simpo"
    """Chosen over rejected in mean log-prob, by a margin."""
    learning_rate: float = Field(1e-6, gt=0)
    """Peak learning rate; the paper's range is 3e-7 to 1e-6, and larger ones make the model repeat itself."""
    beta: float = Field(2.0, gt=0)
    """Scale of the mean log-probs."""
    gamma: float = Field(1.0, ge=0)
    """Target margin of the scaled rewards; the authors advise to start from half of beta."""


class CpoStage(PairedStage):
    """Contrastive preference optimization (Xu et al. 2024): DPO with a uniform reference, plus SFT."""

    method: Literal["cpo"] = "cpo"
    """Chosen over rejected in log-prob, plus SFT on the chosen answer."""
    beta: float = Field(0.1, gt=0)
    """Scale of the log-probs."""
    label_smoothing: Share = Field(0.0, ge=0, lt=0.5)
    """Assumed share of flipped preferences."""
    sft_weight: float = Field(1.0, ge=0)
    """Weight of the chosen answer's negative log-likelihood per token."""


class AlphapoStage(PairedStage):
    """AlphaPO (Gupta et al. 2025): SimPO with another shape of the reward."""

    method: Literal["alphapo"] = "alphapo"
    """Chosen over rejected in a reward whose shape alpha bends."""
    learning_rate: float = Field(1e-6, gt=0)
    """Peak learning rate."""
    beta: float = Field(2.5, gt=0)
    """Scale of the rewards."""
    gamma: float = Field(0.25, ge=0)
    """Target margin of the scaled rewards."""
    alpha: float = 0.25
    """Shape: (1 - p^-alpha) / alpha of the answer's mean probability p; 0 is SimPO's logarithm."""


class KtoStage(PreferenceStage):
    """Kahneman-Tversky optimization (Ethayarajh et al. 2024): single answers with a label."""

    rows: ClassVar[RowKind] = "labels"

    method: Literal["kto"] = "kto"
    """Desirable answers up, undesirable ones down, against the policy's drift on mismatched answers."""
    beta: float = Field(0.1, gt=0)
    """How strongly the policy is held to the reference."""
    desirable_weight: float = Field(1.0, ge=0)
    """Weight of desirable answers (lambda_D)."""
    undesirable_weight: float = Field(1.0, ge=0)
    """Weight of undesirable answers (lambda_U)."""
    reference_update: ReferenceUpdate | None = None
    """Moves the reference during the stage (TR-DPO's way); null: it stays as it was at the start."""


class BcoUnpairedStage(PreferenceStage):
    """Binary classifier optimization (Jung et al. 2024): single answers with a label."""

    rows: ClassVar[RowKind] = "labels"

    method: Literal["bco_unpaired"] = "bco_unpaired"
    """Each answer is classified against the mean reward so far."""
    beta: float = Field(0.1, gt=0)
    """How strongly the policy is held to the reference."""
    desirable_weight: float = Field(1.0, ge=0)
    """Weight of desirable answers."""
    undesirable_weight: float = Field(1.0, ge=0)
    """Weight of undesirable answers."""
    reference_update: ReferenceUpdate | None = None
    """Moves the reference during the stage (TR-DPO's way); null: it stays as it was at the start."""


class PlackettLuceStage(PreferenceStage):
    """DPO over rankings (Rafailov et al. 2023, appendix A.3)."""

    rows: ClassVar[RowKind] = "rankings"

    method: Literal["plackett_luce"] = "plackett_luce"
    """The ranking of k answers, best first, is to be likely."""
    beta: float = Field(0.1, gt=0)
    """How strongly the policy is held to the reference."""
    reference_update: ReferenceUpdate | None = None
    """Moves the reference during the stage (TR-DPO's way); null: it stays as it was at the start."""


class BestAgainstRestStage(PreferenceStage):
    """The best of k answers against all others."""

    rows: ClassVar[RowKind] = "rankings"

    method: Literal["best_against_rest"] = "best_against_rest"
    """The answer with the highest score is to win the softmax over all k."""
    beta: float = Field(0.1, gt=0)
    """How strongly the policy is held to the reference."""
    reference_update: ReferenceUpdate | None = None
    """Moves the reference during the stage (TR-DPO's way); null: it stays as it was at the start."""


class RewardStage(PreferenceStage):
    """A reward model (Bradley-Terry; Ouyang et al. 2022): a scalar head on the last token."""

    makes_policy: ClassVar[bool] = False

    method: Literal["reward"] = "reward"
    """The chosen answer's score above the rejected one's."""
    learning_rate: float = Field(1e-4, gt=0)
    """Peak learning rate; 1e-4 suits LoRA, full fine-tuning wants about a tenth of it."""
    margin: Literal["none", "scores"] = "none"
    """scores: the chosen answer must win by the difference of its row's scores (Touvron et al. 2023)."""
    centering: float = Field(0.0, ge=0)
    """Weight of (sum of the pair's scores)^2, which keeps scores around 0 (Eisenstein et al. 2023); 0.01 is usual."""


def reference_update_of(stage: StageBase) -> ReferenceUpdate | None:
    """How the stage's reference moves; None where it stays, or where the method has none."""
    kinds = (ReferenceStage, KtoStage, BcoUnpairedStage, PlackettLuceStage, BestAgainstRestStage)
    return stage.reference_update if isinstance(stage, kinds) else None


def samples_of(stage: StageBase) -> Samples:
    """The answers that are drawn at the stage's evaluations; see `StageBase.samples`."""
    is_default = isinstance(stage, PreferenceStage) and stage.makes_policy and stage.eval_every > 0
    return stage.samples or (Samples() if is_default else Samples(num_prompts=0))
