"""Forecasts in words: the table of memory, time and disk, and recipe lines to paste.

In: forecasts. Out: text. Must not know: how anything was predicted.
"""

from __future__ import annotations

from collections.abc import Sequence

from tunesmith.pipeline.memory_predict import GIB
from tunesmith.pipeline.memory_stages import Forecast

PARTS = {
    "process": "process, before a model is there",
    "weights": "weights",
    "adapter": "adapter, float32",
    "gradients": "gradients",
    "optimizer": "optimizer's moments",
    "rows": "rows, mapped from disk",
    "activations": "activations and what lives for a moment",
    "logits": "logits, a chunk at a time",
    "dequantized": "one weight at a time, dequantized",
    "slack": "allocator's slack",
}


def memory_text(forecast: Forecast) -> str:
    """Every part of a stage's peak in GiB, the sum, and whether it fits."""
    if forecast.prediction is None:
        return forecast.note
    setting, found, limit = forecast.setting, forecast.prediction, forecast.target.limit_bytes
    head = f"micro-batches of {setting.forest_tokens:,} tokens, gradient checkpointing {setting.gradient_checkpointing}"
    lines = [head]
    for name, size in found.parts.items():
        lines.append(f"{size / GIB:9.3f}  {PARTS[name]}")
    verdict = "fits" if forecast.fitting else "DOES NOT FIT"
    lines.append(f"{found.peak_bytes / GIB:9.3f}  GiB, in the {found.highest}: {verdict} in {limit / GIB:.2f} GiB")
    return "\n".join(lines)


def proposal_text(forecast: Forecast) -> str:
    """Recipe lines that fit, as they are pasted behind the command or into the recipe."""
    if not forecast.changes:
        return "nothing that the recipe can change makes it fit: take a smaller model or a larger card"
    model = [f"  {key.removeprefix('model.')}: {value}" for key, value in forecast.changes if key.startswith("model.")]
    stage = [f"    {key.rsplit('.', 1)[1]}: {value}" for key, value in forecast.changes if not key.startswith("model.")]
    lines = ["this fits:", *(["model:", *model] if model else [])]
    return "\n".join([*lines, "stages:", f"  - name: {forecast.stage}", *stage])


def time_text(forecasts: Sequence[Forecast]) -> str:
    """Time and disk of all stages in one line."""
    known = [forecast.seconds for forecast in forecasts if forecast.seconds is not None]
    disk = sum(forecast.disk_bytes for forecast in forecasts) / GIB
    room = f"{disk:.2f} GiB of disk for checkpoints and results"
    if not known:
        return f"time unknown: this device's rate was not measured; {room}"
    return f"about {_duration(sum(known))}, by the rate of large products here; {room}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
