"""What of TRL 1.16 is compared with which of our methods, under which settings, and where they differ by definition.

In: nothing. Out: comparisons. Must not know: how either side computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Trainer = Literal["dpo", "cpo", "orpo", "kto", "reward"]
Batches = Literal["step", "alone", "halves"]
"""How TRL is given the rows: in one batch, one row a batch, or in two batches; the mean of its losses counts."""


@dataclass(frozen=True)
class Comparison:
    """One of our methods under some settings, and what TRL calls the same.

    peer: what TRL's trainer is set to. prompts: the rows have prompts of several tokens. no_shift: BCO's shift is held
    at 0. difference: what is known to differ by definition; empty: both must agree.
    """

    method: str
    trainer: Trainer
    peer: Mapping[str, Any]
    settings: Mapping[str, Any] = field(default_factory=dict)
    batches: Batches = "step"
    prompts: bool = True
    no_shift: bool = False
    dtype: Literal["float64", "float32"] = "float64"
    difference: str = ""

    @property
    def name(self) -> str:
        """The method with its settings."""
        return ", ".join([self.method, *(f"{key} {value}" for key, value in self.settings.items())])


def dpo(
    method: str,
    loss: str,
    settings: Mapping[str, Any] | None = None,
    peer: Mapping[str, Any] | None = None,
    *,
    difference: str = "",
) -> Comparison:
    """A loss of TRL's DPOTrainer; settings are ours, `peer` are TRL's."""
    return Comparison(method, "dpo", {"loss_types": [loss], **(peer or {})}, settings or {}, difference=difference)


PER_ROW = "TRL's SFT term is the mean over all chosen tokens of a batch; ours the mean of each answer's mean"
NO_SHIFT = "TRL's bco_pair has no shift (it is 0); ours is the mean reward so far, as in the paper"
MPO = {"loss_types": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0], "beta": 0.3}
SIMPO = {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 1.0}
ALPHAPO = {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.5, "simpo_gamma": 0.25, "alpha": 0.25}

SFT = {"loss_types": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7]}
SMOOTH = {"label_smoothing": 0.1}
ALPHA = {"loss_types": ["sigmoid"], "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7}
WEIGHTS = {"desirable_weight": 1.3, "undesirable_weight": 0.7}

COMPARISONS = [
    Comparison("sft", "dpo", {"loss_types": ["sft"]}),
    dpo("dpo", "sigmoid", {"beta": 0.3}, {"beta": 0.3}),
    dpo("dpo", "sigmoid", SMOOTH, SMOOTH, difference="TRL's sigmoid loss reads no label_smoothing"),
    dpo("dpo", "sigmoid", {"divergence": "forward_kl"}, {"f_divergence_type": "forward_kl"}),
    dpo("dpo", "sigmoid", {"divergence": "jensen_shannon"}, {"f_divergence_type": "js_divergence"}),
    # TRL's alpha is 1 - ours; it knows this divergence in float32 at most
    Comparison("dpo", "dpo", ALPHA, {"divergence": "alpha", "divergence_alpha": 0.3}, dtype="float32"),
    dpo("dpo", "sigmoid", {"length_desensitization": 0.4}, {"ld_alpha": 0.4}),
    dpo("dpo", "sigmoid", {"weighting": "wpo"}, {"use_weighting": True}),
    Comparison("dpo", "dpo", SFT, {"sft_weight": 0.7}, "alone"),
    Comparison("dpo", "dpo", SFT, {"sft_weight": 0.7}, difference=PER_ROW),
    dpo("robust_dpo", "robust", {}, SMOOTH),
    dpo("hinge", "hinge"),
    dpo("ipo", "ipo"),
    dpo("ipo", "ipo", {"normalization": "sum"}, difference="TRL has the length-normalized form only"),
    dpo("exo", "exo_pair", {}, {"label_smoothing": 1e-3}),
    dpo("nca", "nca_pair"),
    dpo("sppo", "sppo_hard", {}, {"beta": 1e-3}),
    dpo("aot", "aot"),
    dpo("aot", "aot", SMOOTH, SMOOTH),
    dpo("aot_unpaired", "aot_unpaired"),
    dpo("aot_unpaired", "aot_unpaired", SMOOTH, SMOOTH),
    dpo("apo_zero", "apo_zero"),
    dpo("apo_down", "apo_down"),
    dpo("discopop", "discopop", {"temperature": 0.05}, {"beta": 0.05}),
    dpo("sigmoid_norm", "sigmoid_norm", {}, {"beta": 5.0}),
    Comparison("bco", "dpo", {"loss_types": ["bco_pair"]}, no_shift=True),
    dpo("bco", "bco_pair", difference=NO_SHIFT),
    Comparison("mixture", "dpo", MPO, {"beta": 0.3}, "alone", no_shift=True),
    Comparison("mixture", "dpo", MPO, {"beta": 0.3}, difference=f"{NO_SHIFT}. {PER_ROW}"),
    Comparison("orpo", "orpo", {"beta": 0.5}, {"beta": 0.5}, "alone", prompts=False),
    Comparison(
        "orpo",
        "orpo",
        {"beta": 0.5},
        {"beta": 0.5},
        "alone",
        difference="TRL's SFT term covers the prompt, too; ours the answer only, as in the paper",
    ),
    Comparison("orpo", "orpo", {"beta": 0.5}, {"beta": 0.5}, prompts=False, difference=PER_ROW),
    Comparison("simpo", "cpo", SIMPO),
    Comparison("simpo", "cpo", SIMPO | {"cpo_alpha": 1.0}, difference="TRL's default adds an SFT term (cpo_alpha 1)"),
    Comparison("simpo", "cpo", SIMPO | {"cpo_alpha": 0.6}, {"sft_weight": 0.6}, "alone"),
    Comparison("cpo", "cpo", {"loss_type": "sigmoid"}, batches="alone"),
    Comparison("cpo", "cpo", {"loss_type": "sigmoid", "label_smoothing": 0.1}, {"label_smoothing": 0.1}, "alone"),
    Comparison("cpo", "cpo", {"loss_type": "sigmoid", "cpo_alpha": 0.0}, {"sft_weight": 0.0}),
    Comparison("cpo", "cpo", {"loss_type": "sigmoid"}, difference=PER_ROW),
    Comparison("alphapo", "cpo", ALPHAPO),
    Comparison("alphapo", "cpo", ALPHAPO | {"alpha": -0.5}, {"alpha": -0.5}),
    Comparison("kto", "kto", {}),
    Comparison("kto", "kto", WEIGHTS, WEIGHTS),
    Comparison(
        "kto",
        "kto",
        {},
        batches="halves",
        difference="TRL's KL baseline is a micro-batch's mean (of all ranks); ours the mean over the whole step",
    ),
    Comparison("reward", "reward", {}),
    Comparison("reward", "reward", {"margin": True, "centering": 0.01}, {"margin": "scores", "centering": 0.01}),
]

ABSENT = {
    "completion": "the same loss as sft, over every token",
    "bco_unpaired": "TRL 1.16 has BCO on pairs only (bco_pair), without a shift",
    "plackett_luce": "TRL takes pairs only",
    "best_against_rest": "TRL takes pairs only",
}
"""Methods that TRL 1.16 has no loss for. Nor has it: margins from scores in DPO (ODPO), label smoothing in SFT by its
own code, weights of rows."""

ELSEWHERE = [
    "KTO's mismatched answers: TRL takes the row before's, within batch-sized pieces of the file, whatever its "
    "prompt and whichever rows then meet in a batch; ours are another prompt's",
    "TR-DPO: TRL moves the reference by a callback between steps, ours by the step's own state, saved and resumed",
    "WPO: TRL leaves a pair's weight uncapped; ours is at most 1",
    "exponentials: TRL clamps those of the alpha divergence at 80 nats, where the gradient ends, and no others; "
    "ours go on along the tangent past 30 nats",
]
"""Differences that no loss on fixed log-probs shows."""
