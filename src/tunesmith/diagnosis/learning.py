"""Diagnoses of any stage: does it learn, and only as much as it can be trusted with.

In: a stage's records and settings. Out: a finding, or None. Must not know: models, files.
"""

from __future__ import annotations

import math
import statistics
from bisect import bisect_right

from tunesmith.diagnosis.base import WINDOW, Curves, Diagnosis, Settings, mean, rounded, same_answers

WORSE_SHARE, WORSE_NATS = 0.05, 0.02
"""A held-out loss above its lowest by a twentieth, and by more than a few rows make of it."""
WORSE_TIMES = 2
"""Evaluations in a row that are worse: one can be chance."""
MARGIN_LOST = 0.25
"""Share of the highest held-out margin that is gone again."""
SPIKE_STEPS, SPIKES, SPIKE_FACTOR = 100, 3, 10.0
"""Recent steps that are looked at; how many of them make a pattern; times the median of the steps before."""
LOSS_SPIKE_NATS, LOSS_SPIKE_FACTOR = 1.0, 3.0
"""A step's loss above the median of the steps before, by both."""
RISEN_SHARE, RISEN_NATS = 0.25, 0.25
"""A mean loss above that of the first steps, by both: the stage undoes what was there."""
FIRST_STEPS = 5
ZERO_NORM = 1e-6
"""What gradients of float32 leave that cancel."""
SPENT_LOSS = 1e-3
"""A loss at which no gradient is to be expected."""
UNMOVED, ZERO_GRADIENT, RISING = "unmoved weights", "zero gradient", "rising loss"
"""Kinds of warnings of the watch over the steps."""


def overfitting(curves: Curves, settings: Settings) -> Diagnosis | None:
    """The held-out loss, or the held-out margin, has turned while the training loss goes on falling."""
    turned = _loss_turned(curves) or _margin_turned(curves)
    if turned is None:
        return None
    best, what, figures = turned
    before, now = _training_loss(curves, best)
    if not now < before:
        return None
    keep = "" if settings.keeps_best else "`keep: best` with `eval_every`, which keeps that step; "
    fewer = f"`epochs: {settings.epochs - 1}`" if settings.epochs > 1 else f"`max_steps: {max(best, 1)}`"
    return Diagnosis(
        "overfitting",
        "problem",
        curves.step,
        f"{what}, while the training loss fell from {before:.4g} to {now:.4g}",
        "the rows are learned by heart: too many passes, too few rows, or too high a rate for them",
        f"Set {keep}{fewer}; `learning_rate: {rounded(settings.learning_rate / 2)}`; or add rows.",
        {**figures, "best_step": float(best), "trained_before": before, "trained_now": now},
    )


def _loss_turned(curves: Curves) -> tuple[int, str, dict[str, float]] | None:
    """The step with the lowest held-out loss, what was seen since, and the figures."""
    known = curves.evaluations.known("loss")
    if len(known) <= WORSE_TIMES:
        return None
    best, lowest = min(known, key=lambda each: each[1])
    limit = lowest + max(WORSE_NATS, WORSE_SHARE * abs(lowest))
    last = known[-WORSE_TIMES:]
    if not all(step > best and loss > limit for step, loss in last):
        return None
    text = f"the held-out loss was lowest at step {best} ({lowest:.4g}) and is {last[-1][1]:.4g} at step {last[-1][0]}"
    return best, text, {"heldout_best": lowest, "heldout_now": last[-1][1]}


def _margin_turned(curves: Curves) -> tuple[int, str, dict[str, float]] | None:
    known = curves.evaluations.known("margin")
    if len(known) <= WORSE_TIMES:
        return None
    best, highest = max(known, key=lambda each: each[1])
    last = known[-WORSE_TIMES:]
    if highest <= 0 or not all(step > best and margin < (1 - MARGIN_LOST) * highest for step, margin in last):
        return None
    now, step = last[-1][1], last[-1][0]
    text = f"the held-out margin was highest at step {best} ({highest:.4g}) and is {now:.4g} at step {step}"
    return best, text, {"margin_best": highest, "margin_now": now}


def _training_loss(curves: Curves, best: int) -> tuple[float, float]:
    """Mean training loss up to the best evaluation (the first steps where that is the start), and of the last steps."""
    table = curves.metrics
    split = bisect_right(table.steps, best)
    before = table.mean("loss", until=best) if split else mean(table.column("loss", 0, FIRST_STEPS))
    return before, mean(table.column("loss", max(split, len(table) - WINDOW)))


def gradient_spikes(curves: Curves, settings: Settings) -> Diagnosis | None:
    """Again and again a gradient far longer than the usual ones."""
    spikes = [(step, norm, usual) for step, norm, usual in _spikes(curves, "grad_norm") if norm > SPIKE_FACTOR * usual]
    if len(spikes) < SPIKES:
        return None
    steps = ", ".join(str(step) for step, _, _ in spikes[-5:])
    norm, usual = max((norm, usual) for _, norm, usual in spikes)
    clip = "`max_grad_norm: 1`" if settings.max_grad_norm == 0 else "a lower `max_grad_norm`"
    return Diagnosis(
        "gradient spikes",
        "notice",
        curves.step,
        f"{len(spikes)} of the last {SPIKE_STEPS} steps had a gradient norm above {SPIKE_FACTOR:g} times the usual "
        f"(steps {steps}; up to {norm:.3g}, usually {usual:.3g})",
        "rows that contradict what was learned (swapped pairs, garbled text), or a learning rate at its limit",
        f"Look at the rows of these steps; set {clip} or `learning_rate: {rounded(settings.learning_rate / 2)}`.",
        {"spikes": float(len(spikes)), "highest": norm, "usual": usual},
    )


def _spikes(curves: Curves, key: str) -> list[tuple[int, float, float]]:
    """(step, value, median of the steps before it) of the recent steps that have a usual value to compare with."""
    table = curves.metrics
    start = max(0, len(table) - SPIKE_STEPS - WINDOW)
    steps, values = table.steps[start:], table.column(key, start)
    found = []
    for place in range(max(FIRST_STEPS, len(values) - SPIKE_STEPS), len(values)):
        before = [value for value in values[max(0, place - WINDOW) : place] if math.isfinite(value) and value > 0]
        if len(before) >= FIRST_STEPS and math.isfinite(values[place]):
            found.append((steps[place], values[place], statistics.median(before)))
    return found


def rate_too_high(curves: Curves, settings: Settings) -> Diagnosis | None:
    """The training loss is above where it started, has risen to stay, or jumps again and again."""
    table = curves.metrics
    if len(table) < WINDOW + FIRST_STEPS:
        return None
    # with a reference every step begins at the same loss; without one, it is that of the step's rows
    num_first = 1 if table.has("logratio_chosen") else FIRST_STEPS
    first, now = mean(table.column("loss", 0, num_first)), table.mean("loss")
    jumps = [
        step
        for step, loss, usual in _spikes(curves, "loss")
        if loss > usual + LOSS_SPIKE_NATS and loss > LOSS_SPIKE_FACTOR * usual
    ]
    told: tuple[str, ...] = ()
    if now > first + max(RISEN_NATS, RISEN_SHARE * abs(first)):
        evidence = f"the mean loss of the last {WINDOW} steps is {now:.4g}, and was {first:.4g} at the start"
    elif RISING in curves.warnings:
        evidence = f"the loss rose and stayed up (said at step {curves.warnings[RISING]})"
        told = (RISING,)
    elif len(jumps) >= SPIKES:
        shown = ", ".join(str(step) for step in jumps[-5:])
        evidence = f"the loss jumped in {len(jumps)} of the last {SPIKE_STEPS} steps (steps {shown})"
    else:
        return None
    clip = " and `max_grad_norm: 1`" if settings.max_grad_norm == 0 else ""
    return Diagnosis(
        "learning rate too high",
        "problem",
        curves.step,
        evidence,
        f"updates overshoot: the peak learning rate is {settings.learning_rate:g}",
        f"Set `learning_rate: {rounded(settings.learning_rate / 5)}`{clip}; a longer `warmup_fraction` (0.1) helps "
        "where only the first steps jump.",
        {"loss_first": first, "loss_now": now, "jumps": float(len(jumps))},
        told_by=told,
    )


def dead_adapter(curves: Curves, settings: Settings) -> Diagnosis | None:
    """Trained weights that nothing moves."""
    unmoved = curves.warnings.get(UNMOVED)
    table = curves.metrics
    norms = table.column("grad_norm")[-WINDOW:]
    is_still = len(norms) >= WINDOW and all(norm < ZERO_NORM for norm in norms)
    is_spent = abs(table.mean("loss")) < SPENT_LOSS or same_answers(curves, WINDOW)
    if unmoved is None and (not is_still or is_spent):
        return None
    if unmoved is not None:
        evidence = f"trained tensors were as at the start when it was looked (step {unmoved})"
    else:
        evidence = f"the gradient norm was below {ZERO_NORM:g} in the last {WINDOW} steps"
    return Diagnosis(
        "dead adapter",
        "problem",
        curves.step,
        evidence,
        "the trained weights are not used in the forward pass, or their updates are too small for float32",
        "Look at `tuning.target_modules` (all-linear reaches every layer) and at "
        f"`learning_rate` (now {settings.learning_rate:g}; 1e-4 is usual for SFT with LoRA, 5e-6 for preferences).",
        {} if unmoved is None else {"step": float(unmoved)},
        told_by=(UNMOVED, ZERO_GRADIENT),
    )
