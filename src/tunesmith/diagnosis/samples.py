"""Diagnoses of what the model writes, from the samples of every evaluation, and of what it forgets.

In: a stage's records and settings. Out: a finding, or None. Must not know: models, files, how a figure was measured.

Each compares with the first evaluation: what the base does already is not this stage's doing.
"""

from __future__ import annotations

from dataclasses import dataclass

from tunesmith.diagnosis.base import Curves, Diagnosis, Settings

REPEATED, REPEATED_MORE = 0.2, 0.1
"""Share of an answer's 4-grams that repeat an earlier one: plain prose has a few per cent."""
CUT, CUT_MORE = 0.5, 0.25
"""Share of answers that reach the length limit without ending."""
LANGUAGE_LESS = 0.2
"""Share of answers that have left the prompts' language."""
FEW_ANSWERS = 2.5
"""Answers that may change without meaning anything."""
FORGOTTEN_SHARE, FORGOTTEN_NATS = 0.1, 0.1
"""A rise of the held-out SFT loss by a tenth, and by a tenth of a nat a token."""


@dataclass(frozen=True, slots=True)
class _Course:
    """A figure at the first evaluation that has it, and at the last."""

    start: float
    now: float
    step: int
    first_step: int


def _course(curves: Curves, key: str) -> _Course | None:
    known = curves.evaluations.known(key)
    return _Course(known[0][1], known[-1][1], known[-1][0], known[0][0]) if len(known) > 1 else None


def _is_many(curves: Curves, course: _Course) -> bool:
    """Whether the share's change is more than one or two answers; without their number it counts."""
    counts = curves.evaluations.known("sample_count")
    return not counts or abs(course.now - course.start) * counts[-1][1] > FEW_ANSWERS


def _figures(course: _Course) -> dict[str, float]:
    return {"before": course.start, "now": course.now}


def repetition(curves: Curves, settings: Settings) -> Diagnosis | None:
    """Sampled answers go in circles, and did not at the start."""
    course = _course(curves, "sample_repetition")
    if course is None or course.now < REPEATED or course.now - course.start < REPEATED_MORE:
        return None
    return Diagnosis(
        "repetition",
        "problem",
        curves.step,
        f"at step {course.step} {course.now:.0%} of the 4-grams of sampled answers repeat an earlier one, "
        f"{course.start:.0%} at step {course.first_step}",
        "the policy has collapsed onto a few phrases: it moved too far, or the trained answers themselves repeat",
        f"Set {settings.hold_closer()}, and look for repetition in the trained answers (`tunesmith data audit`).",
        _figures(course),
    )


def truncation(curves: Curves, settings: Settings) -> Diagnosis | None:
    """Sampled answers no longer end."""
    course = _course(curves, "sample_truncated")
    if course is None or course.now < CUT or course.now - course.start < CUT_MORE:
        return None
    if not _is_many(curves, course):
        return None
    return Diagnosis(
        "answers do not end",
        "problem",
        curves.step,
        f"at step {course.step} {course.now:.0%} of sampled answers reach the length limit without a stop token, "
        f"{course.start:.0%} at step {course.first_step}",
        "the stop token has become unlikely: long answers are preferred, or trained answers do not end with it",
        "Look whether trained answers end with the stop token (`tunesmith data show`) and whether the chosen ones are "
        f"longer; else set {settings.hold_closer()}; raise `samples.max_new_tokens` where answers are long by right.",
        _figures(course),
    )


def language_drift(curves: Curves, settings: Settings) -> Diagnosis | None:
    """Fewer sampled answers are in the prompts' language."""
    course = _course(curves, "sample_language")
    if course is None or course.start - course.now < LANGUAGE_LESS or not _is_many(curves, course):
        return None
    return Diagnosis(
        "language drift",
        "problem",
        curves.step,
        f"at step {course.step} {course.now:.0%} of sampled answers are in the prompts' main language, "
        f"{course.start:.0%} at step {course.first_step}",
        "trained answers are in another language than their prompts, or the policy has moved far from its start",
        f"Count the languages of the rows (`tunesmith data audit`); set {settings.hold_closer()}.",
        _figures(course),
    )


def forgetting(curves: Curves, settings: Settings) -> Diagnosis | None:
    """The held-out loss of an earlier SFT stage rises."""
    course = _course(curves, "retained_loss")
    if course is None or course.now - course.start < max(FORGOTTEN_NATS, FORGOTTEN_SHARE * course.start):
        return None
    keeps = "`sft_weight: 0.2`, or " if settings.sft_weight == 0 else ""
    return Diagnosis(
        "forgetting",
        "problem",
        curves.step,
        f"the loss on the earlier SFT stage's held-out rows is {course.now:.3g} nats a token at step {course.step}, "
        f"{course.start:.3g} at step {course.first_step}",
        "what the SFT stage taught is overwritten: nothing in this stage holds it",
        f"Set {keeps}{settings.hold_closer()}.",
        _figures(course),
    )
