"""Diagnoses of preference stages: what a margin alone does not show.

In: a stage's records and settings. Out: a finding, or None. Must not know: models, files.

Log-probs, log-ratios and margins / beta are in nats of a whole answer. Held-out records are believed before those of
the steps: they are of the same rows each time.
"""

from __future__ import annotations

import math

from tunesmith.diagnosis.base import WINDOW, Curves, Diagnosis, Settings, mean, rounded, same_answers

FALLEN_NATS, FALLEN_PER_TOKEN = 2.0, 0.1
"""A chosen answer e^2 = 7 times less likely than at the start is displaced; a long one by a tenth of a nat a token."""
LENGTH_STEPS, LENGTH_CORRELATION, LENGTH_ALONE = 40, 0.5, 0.8
"""Steps that a correlation is taken over (its standard error at 0.5 is then 0.12); what counts as one, with answers
that grow beside it, and without any sample."""
GROWN, GROWN_TOKENS = 1.25, 8.0
"""Sampled answers are longer by this factor, and by so many tokens, than at the start."""
STUCK_NATS, MOVED_NATS = 0.02, 0.2
"""A margin (over beta) that is none, and a log-ratio that is one."""
COIN, COIN_MARGIN = 0.15, 0.5
"""Training accuracy within this of a half, and a margin below this share of the log-ratios: nothing is told apart."""
STUCK_UPDATES = 50
"""Updates at the full rate after which a margin should have opened."""
FEWEST_UPDATES = 5
START_NATS = 0.01
"""A token's log-ratio at the start: above what bf16 and another packing make of equal weights."""
WON, SATURATED = 0.999, 0.05
"""Share of pairs ranked right, and the loss over the first one, at which nothing is left to learn."""


def likelihood_displacement(curves: Curves, settings: Settings) -> Diagnosis | None:
    """Chosen answers fall with the margin rising (Pal et al. 2024, arXiv:2402.13228; Razin et al. 2024,
    arXiv:2410.08847): the likelihood goes to answers that are in no pair."""
    found = _chosen_fell(curves, settings.beta)
    if found is None or settings.method == "apo_down":  # which is meant to lower both
        return None
    where, fall, tokens, margin = found
    if fall < max(FALLEN_NATS, FALLEN_PER_TOKEN * tokens) or margin <= 0:
        return None
    remedies = [settings.hold_closer()]
    if settings.sft_weight is not None:
        wanted = 0.2 if settings.sft_weight == 0 else 2 * settings.sft_weight
        remedies.insert(0, f"`sft_weight: {rounded(wanted)}` (now {settings.sft_weight:g}), which holds it up")
    return Diagnosis(
        "likelihood displacement",
        "problem",
        curves.step,
        f"{where} the chosen answer has lost {fall:.3g} nats ({fall / max(tokens, 1):.2g} a token) since the start, "
        f"while the margin has risen by {margin:.3g}",
        "the margin grows by making rejected answers unlikelier still, and the likelihood goes to answers that are in "
        "no pair; pairs whose answers are much alike do this most",
        f"In this order: {'; '.join(remedies)}; drop pairs whose answers hardly differ.",
        {"nats_lost": fall, "margin_gained": margin, "tokens_chosen": tokens},
    )


def _chosen_fell(curves: Curves, beta: float | None) -> tuple[str, float, float, float] | None:
    """Where it was seen, nats that the chosen answer has lost, its tokens, what the margin has gained."""
    table = curves.evaluations
    known, margins = table.known("logprob_chosen"), table.known("margin")
    if len(known) > 1 and len(margins) > 1 and known[0][0] == 0:
        tokens = table.column("tokens_chosen")[-1]
        fall, rise = known[0][1] - known[-1][1], margins[-1][1] - margins[0][1]
        return f"on held-out pairs, at step {known[-1][0]},", fall, _or_zero(tokens), rise
    rewards = [table.known(f"reward_{side}") for side in ("desirable", "undesirable")]
    if beta and all(len(side) > 1 for side in rewards):  # single answers with a label: rewards are 0 at the start
        good, bad = (side[-1][1] for side in rewards)
        return f"on held-out rows, at step {rewards[0][-1][0]},", -good / beta, 0.0, good - bad
    table = curves.metrics
    if len(table) < WINDOW or not table.has("logratio_chosen"):
        return None
    fall, rise, tokens = (table.mean(key) for key in ("logratio_chosen", "margin", "tokens_chosen"))
    return f"in the last {WINDOW} steps", -fall, _or_zero(tokens), rise


def length_hacking(curves: Curves, settings: Settings) -> Diagnosis | None:
    """The margin follows the length difference, and answers grow (Singhal et al. 2023, arXiv:2310.03716).

    Means over random batches correlate as single pairs do, so the steps' records are enough.
    """
    correlation = length_correlation(curves)
    lengths = curves.evaluations.known("sample_tokens")
    first, now = (lengths[0][1], lengths[-1][1]) if len(lengths) > 1 else (math.nan, math.nan)
    grew = now > GROWN * first and now - first > GROWN_TOKENS
    if not (correlation > LENGTH_CORRELATION and grew) and not (correlation > LENGTH_ALONE and not lengths):
        return None
    samples = f"; sampled answers grew from {first:.0f} tokens to {now:.0f}" if grew else ""
    keys = "`method: sigmoid_norm` or `simpo`, which count a token's share"
    if settings.method == "dpo":
        keys = f"`length_desensitization: 0.5` (LD-DPO), or {keys}"
    return Diagnosis(
        "length hacking",
        "problem" if grew else "notice",
        curves.step,
        f"over the last {LENGTH_STEPS} steps the margin goes with the difference in length: correlation "
        f"{correlation:.2f}{samples}",
        "the chosen answers are often the longer ones, and length is learned in place of what makes them better",
        f"Set {keys}; or balance the lengths of the pairs (`tunesmith data audit` counts them).",
        {"correlation": correlation, **({"tokens_before": first, "tokens_now": now} if grew else {})},
    )


def length_correlation(curves: Curves) -> float:
    """Pearson's, of the steps' margins with their difference in length, without the margin's own trend; nan where the
    records are too few or one of both does not vary."""
    table = curves.metrics
    if len(table) < LENGTH_STEPS or not (table.has("margin") and table.has("tokens_rejected")):
        return math.nan
    margins, chosen, rejected = (table.column(key)[-LENGTH_STEPS:] for key in ("margin", *_LENGTHS))
    rows = [
        (float(place), margin, one - other)
        for place, (margin, one, other) in enumerate(zip(margins, chosen, rejected, strict=True))
        if math.isfinite(margin) and math.isfinite(one - other)
    ]
    if len(rows) < LENGTH_STEPS // 2:
        return math.nan
    places, found, longer = ([row[column] for row in rows] for column in range(3))
    slope = _covariance(places, found) / max(_covariance(places, places), 1e-30)
    flat = [margin - slope * place for margin, place in zip(found, places, strict=True)]
    spread = math.sqrt(_covariance(flat, flat) * _covariance(longer, longer))
    return _covariance(flat, longer) / spread if spread > 1e-12 else math.nan


_LENGTHS = ("tokens_chosen", "tokens_rejected")


def _covariance(one: list[float], other: list[float]) -> float:
    middle, centre = mean(one), mean(other)
    return math.fsum((a - middle) * (b - centre) for a, b in zip(one, other, strict=True))


def margin_stuck(curves: Curves, settings: Settings) -> Diagnosis | None:
    """No margin has opened: equal answers, a rate too small, and labels that contradict each other are told apart."""
    table = curves.metrics
    if len(table) < FEWEST_UPDATES or not table.has("margin"):
        return None
    recent = min(WINDOW, len(table))
    margin = table.mean("margin", recent) / (settings.beta or 1.0)
    figures = {"margin_nats": margin}
    if same_answers(curves, recent) and len(table) >= min(WINDOW, STUCK_UPDATES):
        evidence = f"in the last {recent} steps both answers of every pair have the same tokens and log-probs"
        remedy = "Look at the rows (`tunesmith data audit`): chosen and rejected must differ in what is trained."
        return _stuck(curves, evidence, "the answers of the pairs are identical", remedy, figures)
    if not table.has("logratio_chosen"):
        return None
    if settings.has_dropout and curves.evaluations.known("margin"):  # the steps' figures are noisy with it
        table, recent = curves.evaluations, 1
        margin = table.mean("margin", recent) / (settings.beta or 1.0)
    moved = max(abs(table.mean(key, recent)) for key in ("logratio_chosen", "logratio_rejected"))
    figures = {"margin_nats": margin, "logratio_nats": moved}
    if abs(margin) < STUCK_NATS and moved < STUCK_NATS and _should_have_moved(curves, settings):
        evidence = (
            f"after {len(curves.metrics)} steps the margin is {margin:.2g} nats, and answers moved by {moved:.2g}"
        )
        cause = f"the learning rate is too small: the policy is still its reference (peak {settings.learning_rate:g})"
        remedy = f"Set `learning_rate: {rounded(10 * settings.learning_rate)}`, or train longer."
        return _stuck(curves, evidence, cause, remedy, figures)
    return _coin(curves, settings)


def _coin(curves: Curves, settings: Settings) -> Diagnosis | None:
    """Answers move from step to step, and chosen ones no more than rejected ones."""
    table = curves.metrics
    margin, accuracy = table.mean("margin") / (settings.beta or 1.0), table.mean("accuracy")
    moves = [abs(value) for side in ("chosen", "rejected") for value in table.column(f"logratio_{side}")[-WINDOW:]]
    moved = mean(moves)
    is_coin = abs(accuracy - 0.5) < COIN and moved > MOVED_NATS and abs(margin) < COIN_MARGIN * moved
    if len(table) < WINDOW or not is_coin or not _should_have_moved(curves, settings):
        return None
    evidence = (
        f"answers moved by {moved:.2g} nats and the margin is {margin:.2g}; {accuracy:.0%} of the training pairs "
        "are ranked right, as by a coin"
    )
    cause = "both answers move alike: preferences contradict each other, or the answers hardly differ"
    remedy = "Read pairs (`tunesmith data show`, `audit`): swapped labels, repeated prompts with opposite choices."
    figures = {"margin_nats": margin, "logratio_nats": moved, "accuracy": accuracy}
    return _stuck(curves, evidence, cause, remedy, figures)


def _stuck(curves: Curves, evidence: str, cause: str, remedy: str, figures: dict[str, float]) -> Diagnosis:
    return Diagnosis("margin stuck at zero", "problem", curves.step, evidence, cause, remedy, figures)


def _should_have_moved(curves: Curves, settings: Settings) -> bool:
    """Whether the steps so far amount to enough updates at the full rate, or are all that there will be."""
    if curves.is_over:
        return True
    rates = [rate for rate in curves.metrics.column("lr") if math.isfinite(rate)]
    return math.fsum(rates) >= STUCK_UPDATES * settings.learning_rate


def wrong_reference(curves: Curves, settings: Settings) -> Diagnosis | None:
    """Before the first update the policy is its own reference, so every log-ratio is 0."""
    tables = [curves.evaluations, *([] if settings.has_dropout else [curves.metrics])]
    for table, first in zip(tables, (0, 1), strict=False):
        if not table.has("logratio_chosen") or table.steps[0] != first:
            continue
        sides = {side: table.column(f"logratio_{side}")[0] for side in ("chosen", "rejected")}
        lengths = {side: _or_zero(table.column(f"tokens_{side}")[0]) for side in sides}
        off = [side for side, value in sides.items() if abs(value) > START_NATS * max(1.0, lengths[side])]
        if not off:
            return None
        told = " and ".join(f"{sides[side]:.3g} nats for {side} answers" for side in off)
        return Diagnosis(
            "reference is not the policy",
            "problem",
            curves.step,
            f"before the first update the log-ratio is not 0 but {told}",
            "the reference was scored with other weights, another template or dropout: margins and rewards are "
            "measured from a wrong origin",
            "Delete the reference cache and run again; if it stays, please report it.",
            {f"logratio_{side}": value for side, value in sides.items()},
        )
    return None


def saturation(curves: Curves, settings: Settings) -> Diagnosis | None:
    """Every pair is won and the loss is spent: what still changes is not what the pairs say."""
    table = curves.metrics
    if not settings.is_preference or len(table) < WINDOW + FEWEST_UPDATES or not table.has("accuracy"):
        return None
    accuracy, loss, first = table.mean("accuracy"), table.mean("loss"), mean(table.column("loss", 0, 1))
    if not (accuracy >= WON and 0 <= loss < SATURATED * first):
        return None
    fewer = f"`epochs: {settings.epochs - 1}` (now {settings.epochs})" if settings.epochs > 1 else "fewer `max_steps`"
    return Diagnosis(
        "saturation",
        "notice",
        curves.step,
        f"in the last {WINDOW} steps {accuracy:.1%} of the pairs are ranked right and the loss is {loss:.2g}, "
        f"{loss / first:.1%} of the first step's",
        "the pairs are learned, or are too easy; further steps raise confidence, not quality",
        f"Stop earlier: {fewer} or `keep: best`; or set `label_smoothing: 0.1` where the method has it; or add harder "
        "pairs.",
        {"accuracy": accuracy, "loss": loss},
    )


def kl_over_budget(curves: Curves, settings: Settings) -> Diagnosis | None:
    """Sampled answers have left the starting policy by more than the stage may spend."""
    known = curves.evaluations.known("sample_kl")
    if not known or settings.kl_budget is None or known[-1][1] <= settings.kl_budget:
        return None
    step, kl = known[-1]
    inside = [at for at, value in known if value <= settings.kl_budget and at > 0]
    before = f"; step {inside[-1]} was inside it" if inside else ""
    return Diagnosis(
        "KL over its budget",
        "problem",
        curves.step,
        f"at step {step} sampled answers are {kl:.3g} nats an answer from the starting policy; the budget is "
        f"{settings.kl_budget:g}{before}",
        "the policy is held too loosely or moves too fast, and goes where the preferences say nothing",
        f"Set {settings.hold_closer()}; or `kl_budget: {rounded(1.5 * kl)}` if so much is meant.",
        {"kl": kl, "budget": settings.kl_budget},
    )


def _or_zero(value: float) -> float:
    return value if math.isfinite(value) else 0.0
