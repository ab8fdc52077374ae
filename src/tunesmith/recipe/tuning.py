"""Which weights a stage trains, and how.

In: plain values. Out: frozen, checked settings. Must not know: stages, models' insides.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag

from tunesmith.recipe.values import Share, Strict

Whole = Literal["embeddings", "head"]
Optimizer = Literal[
    "adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "adafactor", "muon", "lion", "schedule_free"
]


class _Chosen(Strict):
    """Choosing trained weights by name, on top of what the kind of tuning trains."""

    kind: str
    """What is trained."""
    train_only: list[str] = Field(default_factory=list)
    """Patterns of weights' names (`model.layers.1?.*`, `*.mlp.*`; a module's name stands for all that is in it): of the
    weights that would be trained only these are; empty: all of them. A pattern that matches no weight is refused."""
    freeze: list[str] = Field(default_factory=list)
    """Patterns of weights' names that are not trained, also of those in `train_only`."""

    @property
    def _chosen(self) -> str:
        return ", of which some are frozen by name" if self.train_only or self.freeze else ""


class Lora(_Chosen):
    """Low-rank adapters (Hu et al. 2021); the base stays frozen."""

    kind: Literal["lora"] = "lora"
    """Low-rank adapters."""
    r: int = Field(16, ge=1)
    """Rank."""
    alpha: float = Field(32.0, gt=0)
    """The adapter's output is scaled by alpha / r, with `rslora` by alpha / sqrt(r)."""
    dropout: Share = Field(0.0, ge=0, lt=1)
    """Dropout on the adapter's input; 0 keeps runs independent of how micro-batches are split."""
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    """Module names that get an adapter; all-linear: every linear layer but the LM head."""
    rslora: bool = False
    """Scale by alpha / sqrt(r), so that a higher rank does not learn more slowly (Kalajdzievski 2023). With the usual
    alpha that is a far larger step: for the same start choose alpha / sqrt(r) as large as alpha / r was."""
    dora: bool = False
    """Learn the length of each output's weights apart from their direction (DoRA, Liu et al. 2024). Slower, and takes
    a matrix of the layer's size more in each layer."""
    init: Literal["zero", "pissa", "loftq"] = "zero"
    """How a new adapter begins. zero: it changes nothing; pissa: with the largest r singular directions of each weight,
    which the frozen part loses (Meng et al. 2024; saved as a plain adapter of rank 2 r on the untouched base); loftq:
    with what `model.quantization: nf4` rounds away, as far as rank r can say it (Li et al. 2023, one iteration)."""
    b_lr_ratio: float = Field(1.0, gt=0)
    """Learning rate of the second matrices (B) over that of the first (LoRA+, Hayou et al. 2024, who use about 16, with
    a lower `learning_rate`); 1: the same."""
    modules_to_save: list[Whole] = Field(default_factory=list)
    """Layers that are trained whole beside the adapter and saved with it, in float32: the embeddings, the head. Where
    the model ties the two, either one means both, and they stay tied."""

    @property
    def described(self) -> str:
        """What is trained, in words."""
        kinds = [name for name, is_on in (("rank-stabilized", self.rslora), ("DoRA", self.dora)) if is_on]
        kinds += [] if self.init == "zero" else [{"pissa": "PiSSA", "loftq": "LoftQ"}[self.init]]
        kinds += [f"B's rate times {self.b_lr_ratio:g}"] if self.b_lr_ratio != 1 else []
        whole = f", {' and '.join(self.modules_to_save)} whole" if self.modules_to_save else ""
        more = f" ({', '.join(kinds)})" if kinds else ""
        return f"LoRA r {self.r}, alpha {self.alpha:g}{more}{whole}{self._chosen}"


class Full(_Chosen):
    """Every weight is trained, in float32."""

    kind: Literal["full"] = "full"
    """All weights."""

    @property
    def described(self) -> str:
        """What is trained, in words."""
        return f"all weights{self._chosen}"


def _tuning_kind(value: object) -> object:
    """`tuning: {r: 32}` means LoRA, as an absent `tuning` does."""
    if isinstance(value, Lora | Full):
        return value.kind
    return value.get("kind", "lora") if isinstance(value, Mapping) else None


Tuning = Annotated[Annotated[Lora, Tag("lora")] | Annotated[Full, Tag("full")], Discriminator(_tuning_kind)]
