"""The page of a calibration: one self-contained HTML file with two drawings and the table; nothing is loaded or run.

In: the probes, the choice, the lines for a person. Out: HTML. Must not know: models, how a probe is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from tunesmith.comparison.charts import short
from tunesmith.pipeline.calibrate_search import Choice, Limits, Probe, excess

CELL_WIDTH, CELL_HEIGHT, LEFT, TOP = 96.0, 54.0, 84.0, 28.0
PLOT_WIDTH, PLOT_HEIGHT, MARGIN = 440.0, 240.0, 48.0
STYLE = """
:root{color-scheme:light dark;--ink:#1d2329;--soft:#5c6670;--paper:#fff;--line:#d5dadf;--best:#0b7a5c}
@media(prefers-color-scheme:dark){:root{--ink:#e6eaee;--soft:#a3adb7;--paper:#15191d;--line:#3a434c;--best:#4fd1a8}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:60rem;margin:2rem auto;
padding:0 1rem}svg{max-width:100%;height:auto}text{fill:var(--ink);font:12px system-ui,sans-serif}
.soft{fill:var(--soft);color:var(--soft)}pre{overflow-x:auto;font-size:13px}.grid{stroke:var(--line)}
.best{stroke:var(--best);stroke-width:3;fill:none}
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(stage: str, lines: Sequence[str], probes: Sequence[Probe], choice: Choice, limits: Limits) -> str:
    """The whole page."""
    table = "\n".join(lines)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<meta name="viewport" content="width=device-width"><title>Calibration of {escape(stage)}</title>'
        f"<style>{STYLE}</style></head><body><h1>Calibration of stage {escape(stage)}</h1>"
        f"{_heat_map(probes, choice, limits)}{_drift(probes, choice, limits)}"
        f"<h2>The probes</h2><pre>{escape(table)}</pre></body></html>\n"
    )


def _figure(probe: Probe) -> float | None:
    """What a cell is coloured by: accuracy where there is one, else minus the loss."""
    if probe.problem:
        return None
    return -probe.loss if probe.accuracy is None else probe.accuracy


def _heat_map(probes: Sequence[Probe], choice: Choice, limits: Limits) -> str:
    """Learning rate across, beta up; the better a probe, the darker its cell; what is beyond a limit is struck out."""
    rates = sorted({probe.learning_rate for probe in probes})
    betas = sorted({probe.beta or 0.0 for probe in probes}, reverse=True)
    known = [figure for probe in probes if (figure := _figure(probe)) is not None]
    low, high = min(known, default=0.0), max(known, default=1.0)
    width, height = LEFT + CELL_WIDTH * len(rates) + 8, TOP + CELL_HEIGHT * len(betas) + 44
    what = "held-out accuracy" if any(probe.accuracy is not None for probe in probes) else "held-out loss"
    parts = [f'<text x="{LEFT}" y="16">{what} by learning rate and beta; struck out: beyond a limit</text>']
    for probe in probes:
        x = LEFT + CELL_WIDTH * rates.index(probe.learning_rate)
        y = TOP + CELL_HEIGHT * betas.index(probe.beta or 0.0)
        parts += _cell(probe, x, y, low=low, high=high, limits=limits, is_best=probe is choice.probe)
    foot = TOP + CELL_HEIGHT * len(betas)
    for number, rate in enumerate(rates):
        x = LEFT + CELL_WIDTH * (number + 0.5)
        parts.append(f'<text x="{x}" y="{foot + 18}" text-anchor="middle">{short(rate)}</text>')
    parts.append(f'<text x="{LEFT}" y="{foot + 38}" class="soft">learning rate</text>')
    for number, beta in enumerate(betas):
        y = TOP + CELL_HEIGHT * (number + 0.5) + 4
        label = f"beta {short(beta)}" if beta else ""
        parts.append(f'<text x="{LEFT - 8}" y="{y}" text-anchor="end">{label}</text>')
    return _svg(width, height, f"{what} of every probe", parts)


def _cell(probe: Probe, x: float, y: float, *, low: float, high: float, limits: Limits, is_best: bool) -> list[str]:
    figure, over = _figure(probe), "; ".join(excess(probe, limits))
    share = 0.0 if figure is None else (figure - low) / max(high - low, 1e-12)
    box = f'x="{x + 2}" y="{y + 2}" width="{CELL_WIDTH - 4}" height="{CELL_HEIGHT - 4}" rx="4"'
    shown = "none" if figure is None else short(abs(figure), digits=3)
    below = "" if probe.kl is None else f"KL {short(probe.kl, digits=3)}"
    middle = x + CELL_WIDTH / 2
    parts = [
        f'<rect {box} fill="#2a78d6" fill-opacity="{0.08 + 0.5 * share:.2f}"><title>{escape(over or "within")}</title>'
        "</rect>",
        f'<text x="{middle}" y="{y + 24}" text-anchor="middle">{shown}</text>',
        f'<text x="{middle}" y="{y + 41}" text-anchor="middle" class="soft">{below}</text>',
    ]
    if over:
        parts.append(f'<path d="M{x + 6} {y + CELL_HEIGHT - 6}L{x + CELL_WIDTH - 6} {y + 6}" class="grid"/>')
    if is_best:
        parts.append(f'<rect {box} class="best"/>')
    return parts


def _drift(probes: Sequence[Probe], choice: Choice, limits: Limits) -> str:
    """Accuracy against the KL from the stage's start, with the limit; empty where either is not measured."""
    points = [
        (probe, probe.kl, probe.accuracy) for probe in probes if probe.kl is not None and probe.accuracy is not None
    ]
    if not points:
        return ""
    right = max(limits.kl * 1.5, min(limits.kl * 4, max(kl for _, kl, _ in points)))
    low, high = min(accuracy for _, _, accuracy in points), max(accuracy for _, _, accuracy in points)

    def place(kl: float, accuracy: float) -> tuple[float, float]:
        x = MARGIN + (PLOT_WIDTH - 2 * MARGIN) * min(max(kl, 0.0), right) / right
        y = PLOT_HEIGHT - MARGIN - (PLOT_HEIGHT - 2 * MARGIN) * (accuracy - low) / max(high - low, 1e-12)
        return round(x, 1), round(y, 1)

    edge = place(limits.kl, low)[0]
    parts = [
        f'<text x="{MARGIN}" y="20">held-out accuracy against KL; the line is the limit</text>',
        f'<path d="M{edge} {MARGIN - 12}V{PLOT_HEIGHT - MARGIN + 6}" class="grid"/>',
        f'<text x="{edge}" y="{PLOT_HEIGHT - MARGIN + 22}" text-anchor="middle">{short(limits.kl, digits=3)}</text>',
        f'<text x="{PLOT_WIDTH - MARGIN}" y="{PLOT_HEIGHT - 8}" text-anchor="end" class="soft">nats an answer</text>',
        f'<text x="4" y="{place(0, high)[1] + 4}">{short(high, digits=3)}</text>',
        f'<text x="4" y="{place(0, low)[1] + 4}">{short(low, digits=3)}</text>',
    ]
    for probe, kl, accuracy in points:
        x, y = place(kl, accuracy)
        name = f"learning rate {probe.learning_rate:g}, beta {probe.beta}: KL {kl:.3g}, accuracy {accuracy:.3f}"
        parts.append(f'<circle cx="{x}" cy="{y}" r="5" fill="#2a78d6"><title>{escape(name)}</title></circle>')
        if probe is choice.probe:
            parts.append(f'<circle cx="{x}" cy="{y}" r="9" class="best"/>')
    return _svg(PLOT_WIDTH, PLOT_HEIGHT, "accuracy and KL of every probe", parts)


def _svg(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    head = f'<svg viewBox="0 0 {width:g} {height:g}" width="{width:g}" role="img" aria-label="{escape(title)}">'
    return f"<figure>{head}{''.join(parts)}</svg></figure>"
