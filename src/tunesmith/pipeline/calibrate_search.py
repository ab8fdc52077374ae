"""Where `tunesmith calibrate` probes next, and which probe it recommends.

In: what the probes so far came to. Out: the next settings; a choice, with its reason.
Must not know: models, rows, files.

The grid has half-decades on both axes, two decades around the recipe's values. Every second point is probed first;
then the neighbours of the choice so far, until the choice stands: coarse to fine.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

REACH = 2
"""Half-decades of the grid to each side of the recipe's value: from a tenth of it to ten times it."""
Place = tuple[int, int]
"""Half-decades from the recipe's learning rate, and from its beta."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a probe may not exceed. kl: nats an answer from the stage's start, on answers that the policy samples;
    fall: nats a token by which the chosen answers become less likely."""

    kl: float
    fall: float


@dataclass(frozen=True, slots=True)
class Probe:
    """A short training with one pair of values, and the held-out figures at its end.

    beta: None where the method has none, or only the learning rate is searched. accuracy, and spread (how much more the
    chosen answer gained than the rejected one, nats an answer), of methods that compare answers; kl, fall: see Limits;
    each None where it cannot be measured. problem: why the probe has no figures.
    """

    place: Place
    learning_rate: float
    beta: float | None
    seconds: float
    loss: float = math.nan
    num_heldout: int = 0
    accuracy: float | None = None
    spread: float | None = None
    fall: float | None = None
    kl: float | None = None
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Choice:
    """The recommended probe and why; `within`: it keeps the limits."""

    probe: Probe
    why: str
    within: bool


def values_at(place: Place, *, learning_rate: float, beta: float | None) -> tuple[float, float | None]:
    """The settings at a place of the grid, to two digits."""
    return _stepped(learning_rate, place[0]), None if beta is None else _stepped(beta, place[1])


def _stepped(value: float, half_decades: int) -> float:
    return value if half_decades == 0 else float(f"{value * 10 ** (half_decades / 2):.2g}")


def coarse_places(*, searches_beta: bool) -> list[Place]:
    """The corners, edges and middle of the grid."""
    steps = range(-REACH, REACH + 1, 2)
    return [(rate, beta) for rate in steps for beta in (steps if searches_beta else (0,))]


def next_places(probes: Sequence[Probe], limits: Limits, *, searches_beta: bool) -> list[Place]:
    """The neighbours of the choice so far that were not probed; none: it stands."""
    done = {probe.place for probe in probes}
    rate, beta = choose(probes, limits).probe.place
    beside = (-1, 0, 1) if searches_beta else (0,)
    near = [(rate + along, beta + up) for along in (-1, 0, 1) for up in beside]
    return [place for place in near if place not in done and max(map(abs, place)) <= REACH]


def excess(probe: Probe, limits: Limits) -> Iterator[str]:
    """Why a probe is out, in words; nothing where it is within the limits."""
    if probe.problem:
        yield probe.problem
    if probe.kl is not None and not probe.kl <= limits.kl:
        yield f"KL {probe.kl:.3g} > {limits.kl:.3g}"
    if probe.fall is not None and not probe.fall <= limits.fall:
        yield f"the chosen answers fall by {probe.fall:.3g} nats a token > {limits.fall:.3g}"


def choose(probes: Sequence[Probe], limits: Limits) -> Choice:
    """The recommended one of `probes`.

    Within the limits, and where answers are compared: of those whose accuracy is within one standard error of the
    highest, the one with the largest spread; else the lowest loss. Where none is within the limits: the one that goes
    beyond them least. There is at least one probe with figures.
    """
    found = [probe for probe in probes if not probe.problem]
    within = [probe for probe in found if not list(excess(probe, limits))]
    if not within:
        least = min(found, key=lambda probe: max(_share(probe.kl, limits.kl), _share(probe.fall, limits.fall)))
        return Choice(least, "no probe kept the limits; this one went beyond them least", within=False)
    rated = [(probe.accuracy, probe) for probe in within if probe.accuracy is not None]
    if len(rated) < len(within):
        return Choice(min(within, key=lambda probe: probe.loss), "the lowest held-out loss", within=True)
    top, best = max(rated, key=lambda pair: pair[0])
    error = math.sqrt(max(top * (1 - top), 0.25 / best.num_heldout) / best.num_heldout)
    near = [probe for accuracy, probe in rated if accuracy >= top - error]
    chosen = max(near, key=lambda probe: -math.inf if probe.spread is None else probe.spread)
    why = (
        f"of the {len(near)} probes within the limits whose held-out accuracy is within a standard error "
        f"({error:.3f}) of the highest ({top:.3f}), the largest margin in nats"
    )
    return Choice(chosen, why, within=True)


def probe_line(probe: Probe, limits: Limits, *, is_best: bool) -> str:
    """A probe for a person: its settings, its figures, and why it is out."""
    parts = [f"learning_rate {probe.learning_rate:<8.2g}"]
    parts += [] if probe.beta is None else [f"beta {probe.beta:<8.2g}"]
    if not probe.problem:
        parts.append(f"loss {probe.loss:.4f}")
        given = {"accuracy": probe.accuracy, "margin (nats)": probe.spread, "fall": probe.fall, "KL": probe.kl}
        parts += [f"{name} {value:.3f}" for name, value in given.items() if value is not None]
    over = "; ".join(excess(probe, limits))
    return "  ".join([*parts, *([f"out: {over}"] if over else []), *(["<- recommended"] if is_best else [])])


def _share(value: float | None, limit: float) -> float:
    return -math.inf if value is None else value / limit


def figures_of(
    first: Mapping[str, object], last: Mapping[str, object], *, beta: float | None
) -> dict[str, float | int | None]:
    """A probe's figures from the held-out evaluations at its start and its end."""

    def number(record: Mapping[str, object], name: str) -> float | None:
        value = record.get(name)
        return float(value) if isinstance(value, int | float) else None

    margin, tokens = number(last, "margin"), number(last, "tokens_chosen")
    before, after = number(first, "logprob_chosen"), number(last, "logprob_chosen")
    has_fall = before is not None and after is not None and tokens
    loss = number(last, "loss")
    return {
        "loss": math.nan if loss is None else loss,
        "num_heldout": int(number(last, "num_examples") or 0),
        "accuracy": number(last, "accuracy"),
        "spread": None if margin is None else margin / (beta or 1.0),
        "fall": (before - after) / tokens if has_fall else None,  # type: ignore[operator]  # has_fall says so
    }
