"""Which weights a stage trains, and how.

In: plain values. Out: frozen, checked settings. Must not know: stages, models' insides.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag

from tunesmith.recipe.values import Share, Strict


class Lora(Strict):
    """Low-rank adapters (Hu et al. 2021); the base stays frozen."""

    kind: Literal["lora"] = "lora"
    """Low-rank adapters."""
    r: int = Field(16, ge=1)
    """Rank."""
    alpha: float = Field(32.0, gt=0)
    """The adapter's output is scaled by alpha / r."""
    dropout: Share = Field(0.0, ge=0, lt=1)
    """Dropout on the adapter's input; 0 keeps runs independent of how micro-batches are split."""
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    """Module names that get an adapter; all-linear: every linear layer but the LM head."""


class Full(Strict):
    """Every weight is trained, in float32."""

    kind: Literal["full"] = "full"
    """All weights."""


def _tuning_kind(value: object) -> object:
    """`tuning: {r: 32}` means LoRA, as an absent `tuning` does."""
    if isinstance(value, Lora | Full):
        return value.kind
    return value.get("kind", "lora") if isinstance(value, Mapping) else None


Tuning = Annotated[Annotated[Lora, Tag("lora")] | Annotated[Full, Tag("full")], Discriminator(_tuning_kind)]
