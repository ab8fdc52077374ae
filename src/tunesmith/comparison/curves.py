"""A stage's curves: which records become which chart.

In: the records of a stage's steps and evaluations. Out: charts. Must not know: HTML, figures of the comparison.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tunesmith.comparison.charts import Chart, Point, Series, line_chart
from tunesmith.runs.records import Value

Records = Sequence[Mapping[str, Value]]

TRAINED, HELDOUT = "trained", "held out"


def stage_charts(
    metrics: Records, evaluations: Records, *, is_preference: bool, has_replay: bool, scores: bool = False
) -> list[Chart]:
    """The charts of one stage; those without a record are left out. `scores`: it is a reward model's."""
    heldout = [Series(HELDOUT, points(evaluations, "loss"), "heldout", marked=True)]
    unit = "nats a pair" if is_preference else "nats a token"
    note = "The trained line includes the replayed text, the held-out one does not." if has_replay else ""
    charts = [line_chart("Loss", [Series(TRAINED, points(metrics, "loss"), "trained"), *heldout], unit=unit, note=note)]
    if scores:
        charts += _reward_charts(metrics, evaluations)
    elif is_preference:
        charts += _preference_charts(metrics, evaluations)
    charts.append(line_chart("Learning rate", [Series("rate", points(metrics, "lr"), "plain", noisy=False)], unit=""))
    charts.append(
        line_chart("Gradient norm", [Series("norm", points(metrics, "grad_norm"), "plain")], unit="before clipping")
    )
    return [chart for chart in charts if chart is not None]


def _reward_charts(metrics: Records, evaluations: Records) -> list[Chart | None]:
    ranked = [
        Series(TRAINED, points(metrics, "accuracy", 100), "trained"),
        Series(HELDOUT, points(evaluations, "accuracy", 100), "heldout", marked=True),
    ]
    scores = [
        Series("chosen", points(evaluations, "reward_chosen"), "chosen", marked=True),
        Series("rejected", points(evaluations, "reward_rejected"), "rejected", marked=True),
    ]
    error = [Series(HELDOUT, points(evaluations, "calibration_error", 100), "heldout", marked=True)]
    return [
        line_chart("Pairs ranked right", ranked, unit="% of pairs, ties half"),
        line_chart("Scores, held out", scores, unit="nats"),
        line_chart(
            "Calibration error",
            error,
            unit="% of probability",
            note="How far probabilities are from shares, on average.",
        ),
    ]


def _preference_charts(metrics: Records, evaluations: Records) -> list[Chart | None]:
    return [
        line_chart(
            "Margin of implicit rewards",
            [
                Series(TRAINED, points(metrics, "margin"), "trained"),
                Series(HELDOUT, points(evaluations, "margin"), "heldout", marked=True),
            ],
            unit="nats times beta",
        ),
        line_chart(
            "Pairs ranked right",
            [
                Series(TRAINED, points(metrics, "accuracy", 100), "trained"),
                Series(HELDOUT, points(evaluations, "accuracy", 100), "heldout", marked=True),
            ],
            unit="% of pairs, ties half",
        ),
        line_chart(
            "Implicit rewards",
            [
                Series("chosen", points(metrics, "reward_chosen"), "chosen"),
                Series("rejected", points(metrics, "reward_rejected"), "rejected"),
            ],
            unit="nats times beta",
        ),
        line_chart(
            "Log-ratio to the reference",
            [
                Series("chosen", points(metrics, "logratio_chosen"), "chosen"),
                Series("rejected", points(metrics, "logratio_rejected"), "rejected"),
            ],
            unit="nats an answer",
            note="On the data's answers. It is not a KL; the KL in the table is estimated on sampled answers.",
        ),
    ]


def points(records: Records, key: str, factor: float = 1.0) -> list[Point]:
    """(step, value) of every record that has a number under `key`."""
    found: list[Point] = []
    for record in records:
        step, value = record.get("step"), record.get(key)
        if isinstance(step, int) and isinstance(value, int | float):
            found.append((float(step), factor * float(value)))
    return found
