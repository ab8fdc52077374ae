"""Modes of a model while it trains or is evaluated, and back, whatever happens in between.

In: a model. Out: contexts. Must not know: data, objectives, files.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

Dropout = Literal["model", "adapter", "off"]
"""model: every dropout that the model and its adapter define; adapter: the adapter's alone; off: none."""


@contextmanager
def restored_modes(model: nn.Module) -> Iterator[None]:
    """Every module is in train or eval mode as before, afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """No dropout inside."""
    with restored_modes(model):
        model.eval()
        yield


@contextmanager
def training_mode(model: PreTrainedModel, *, dropout: Dropout, gradient_checkpointing: bool) -> Iterator[None]:
    """The modes of a stage: its dropouts, and checkpointing of activations where it is wanted."""
    before = _is_checkpointing(model)
    with restored_modes(model):
        _set_checkpointing(model, gradient_checkpointing)
        _set_dropout(model, dropout)
        try:
            yield
        finally:
            _set_checkpointing(model, before)


def _is_checkpointing(model: nn.Module) -> bool:
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    return any(layer.gradient_checkpointing for layer in layers)


def _set_checkpointing(model: PreTrainedModel, wanted: bool) -> None:
    if wanted:
        # Reentrant checkpointing needs an input that wants a gradient, and LoRA's has none: lora_B would stay 0.
        model.gradient_checkpointing_enable({"use_reentrant": False})
    elif _is_checkpointing(model):
        model.gradient_checkpointing_disable()


def _set_dropout(model: PreTrainedModel, dropout: Dropout) -> None:
    if dropout == "model":
        model.train()
        return
    model.train(False)
    for name, module in model.named_modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True  # transformers checkpoints only layers in train mode; their parts stay in eval
        elif dropout == "adapter" and "lora_dropout" in name.split("."):
            module.train()
