"""Geometry of the report's charts: numbers to paths, ticks and labels. The template draws them.

In: series of (x, y) points. Out: frozen shapes in the units of an SVG view box. Must not know: HTML, files, models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from tunesmith.comparison.statistics import Estimate

Point = tuple[float, float]

WIDTH, HEIGHT = 340.0, 200.0
LEFT, RIGHT, TOP, BOTTOM = 42.0, 94.0, 10.0, 30.0
"""Margins: the right one holds the lines' names, which stand at their ends instead of in a legend."""
LABEL_GAP = 15.0
"""Least distance between two names, so that they never overlap."""
MAX_POINTS = 400
"""More points than this are thinned to means of neighbours; the plot is 200 units wide."""
NUM_SMOOTHED = 40
"""Lines of more points than this are drawn as a running mean over the single steps."""


@dataclass(frozen=True, slots=True)
class Series:
    """One line: its name, its points, and the class that colours it.

    `marked` draws every point (evaluations); `noisy` lines of many points are smoothed.
    """

    label: str
    points: Sequence[Point]
    css: str
    marked: bool = False
    noisy: bool = True


@dataclass(frozen=True, slots=True)
class Tick:
    """A tick at `at` (view box units) with its text."""

    at: float
    text: str


@dataclass(frozen=True, slots=True)
class Line:
    """A drawn line: `path` is what is read, `faint` the single steps behind it (empty where there are few)."""

    label: str
    css: str
    path: str
    faint: str
    dots: tuple[Point, ...]
    label_y: float
    end: Point
    last: str


@dataclass(frozen=True, slots=True)
class Chart:
    """A line chart, ready to draw. `description` says in words what is shown, for those who cannot see it."""

    title: str
    unit: str
    note: str
    description: str
    lines: tuple[Line, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]


def line_chart(title: str, series: Sequence[Series], *, unit: str, note: str = "") -> Chart | None:
    """A chart of `series` over steps; None where no series has a finite point."""
    kept = [replace(one, points=thinned(finite(one.points))) for one in series]
    kept = [one for one in kept if one.points]
    if not kept:
        return None
    xs = [x for one in kept for x, _ in one.points]
    ys = [y for one in kept for _, y in one.points]
    x_ticks, y_ticks = nice_ticks(min(0.0, min(xs)), max(xs), 4), nice_ticks(min(ys), max(ys), 4)
    x_range, y_range = (x_ticks[0], max(max(xs), x_ticks[0] + 1)), (y_ticks[0], y_ticks[-1])

    def place(point: Point) -> Point:
        return (
            round(_scaled(point[0], x_range, LEFT, WIDTH - RIGHT), 1),
            round(_scaled(point[1], y_range, HEIGHT - BOTTOM, TOP), 1),
        )

    drawn = [(one, [place(point) for point in one.points]) for one in kept]
    means = [
        smoothed(points) if one.noisy and not one.marked and len(points) > NUM_SMOOTHED else points
        for one, points in drawn
    ]
    label_ys = spread([points[-1][1] for points in means], gap=LABEL_GAP, low=TOP, high=HEIGHT - BOTTOM)
    lines = tuple(
        Line(
            label=one.label,
            css=one.css,
            path=_path(mean),
            faint=_path(points) if mean is not points else "",
            dots=tuple(points) if one.marked or len(points) == 1 else (),
            label_y=round(label_y, 1),
            end=mean[-1],
            last=short(one.points[-1][1], digits=3),
        )
        for (one, points), mean, label_y in zip(drawn, means, label_ys, strict=True)
    )
    words = "; ".join(f"{one.label} from {short(one.points[0][1])} to {short(one.points[-1][1])}" for one in kept)
    return Chart(
        title=title,
        unit=unit,
        note=note,
        description=f"{title}, {unit}, over steps {short(min(xs))} to {short(max(xs))}: {words}.",
        lines=lines,
        x_ticks=tuple(Tick(place((x, y_range[0]))[0], short(x)) for x in x_ticks if x <= x_range[1]),
        y_ticks=tuple(Tick(place((x_range[0], y))[1], short(y)) for y in y_ticks),
    )


@dataclass(frozen=True, slots=True)
class Whisker:
    """A figure's dot and interval, in percent of the plot's width; None where there is none."""

    css: str
    at: float
    low: float | None
    high: float | None


def whiskers(estimates: Sequence[tuple[str, Estimate]], *, is_share: bool) -> tuple[Whisker, ...]:
    """Dots and intervals on one axis: 0 to 1 for shares, else from 0 (or below) to the largest end."""
    known = [(css, one) for css, one in estimates if one.value is not None]
    ends = [end for _, one in known for end in (one.low, one.value, one.high) if end is not None]
    if not ends:
        return ()
    axis = (0.0, 1.0) if is_share else (min(0.0, *ends), max(*ends, 1e-9) * 1.02)

    def place(value: float | None) -> float | None:
        return None if value is None else round(_scaled(value, axis, 0.0, 100.0), 2)

    return tuple(Whisker(css, place(one.value) or 0.0, place(one.low), place(one.high)) for css, one in known)


def finite(points: Sequence[Point]) -> list[Point]:
    """The points that can be drawn; a step without a figure leaves a gap that the line crosses."""
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most MAX_POINTS points: means of equal numbers of neighbours, and the last point as it is."""
    size = math.ceil(len(points) / MAX_POINTS)
    if size <= 1:
        return list(points)
    groups = [points[start : start + size] for start in range(0, len(points) - 1, size)]
    means = [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]
    return [*means, points[-1]]


def smoothed(points: Sequence[Point]) -> list[Point]:
    """A centred running mean over a twentieth of the points on each side; shorter at the ends."""
    reach = max(1, len(points) // 20)
    found: list[Point] = []
    for number, (x, _) in enumerate(points):
        near = min(reach, number, len(points) - 1 - number)
        window = points[number - near : number + near + 1] if near else points[number : number + 1]
        found.append((x, round(sum(y for _, y in window) / len(window), 2)))
    return found


def nice_ticks(low: float, high: float, num: int) -> list[float]:
    """About `num` steps of 1, 2 or 5 times a power of ten that span low to high."""
    if high <= low:
        pad = abs(low) * 0.5 or 0.5
        low, high = low - pad if low else 0.0, high + pad
    raw = (high - low) / num
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def spread(places: Sequence[float], *, gap: float, low: float, high: float) -> list[float]:
    """The places moved apart to at least `gap`, order kept, within low to high as far as there is room."""
    order = sorted(range(len(places)), key=lambda number: places[number])
    moved = [min(max(place, low), high) for place in places]
    for before, after in pairwise(order):
        moved[after] = max(moved[after], moved[before] + gap)
    overflow = moved[order[-1]] - high
    if overflow > 0:
        moved[order[-1]] = high
        for after, before in pairwise(reversed(order)):
            moved[before] = min(moved[before], moved[after] - gap)
    return moved


def short(value: float, *, digits: int = 4) -> str:
    """A number for an axis or a label, with a real minus sign; powers of ten below 0.01 and from 100,000 on."""
    if value == 0:
        return "0"
    if abs(value) < 0.01 or abs(value) >= 1e5:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        text = f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    else:
        text = f"{value:.{digits}g}" if abs(value) < 10**digits else f"{value:.0f}"
    return text.replace("-", "−")


def _scaled(value: float, axis: tuple[float, float], start: float, end: float) -> float:
    return start + (value - axis[0]) / (axis[1] - axis[0]) * (end - start)


def _path(points: Sequence[Point]) -> str:
    return "M" + "L".join(f"{x:g} {y:g}" for x, y in points)
