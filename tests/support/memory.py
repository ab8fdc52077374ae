"""Memory that runs out on purpose: a model whose forward or backward fails as an allocator would."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

ERRORS: dict[str, Callable[[], Exception]] = {
    "cuda": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cpu": lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 8589934592 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "python": lambda: MemoryError(),
}

Place = Literal["forward", "backward", "scoring"]


@dataclass
class FullMemory:
    """Fails once, in the forest number `at` (from 1) of a kind, or in every forest of more than `limit` tokens.

    forward, backward: of forests with gradient, half way through the layers; scoring: forests without gradient.
    """

    place: Place = "backward"
    at: int = 0
    limit: int | None = None
    error: str = "cuda"
    seen: int = 0
    failures: int = 0
    largest: int = 0
    sizes: list[int] = field(default_factory=list)

    def watch(self, model: PreTrainedModel) -> FullMemory:
        """Attach to the last layer, so that a failing backward has already left gradients behind."""
        layers = model.model.layers
        assert len(layers) > 1
        layers[-1].register_forward_pre_hook(self._enter)
        return self

    def _enter(self, _layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        hidden = inputs[0]
        if torch.is_grad_enabled() == (self.place == "scoring"):
            return
        self.seen += 1
        tokens = hidden.shape[1]
        if not (self.seen == self.at or (self.limit is not None and tokens > self.limit)):
            self.sizes.append(tokens)
            return
        if self.place == "backward":
            hidden.register_hook(self._fail)
        else:
            self._fail()

    def _fail(self, _gradient: Tensor | None = None) -> None:
        self.failures += 1
        raise ERRORS[self.error]()
