"""Modes of a model while it trains or is evaluated, and back, whatever happens in between.

In: a model. Out: contexts. Must not know: data, objectives, files.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Literal

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from tunesmith.errors import ModelError

Dropout = Literal["model", "adapter", "off"]
"""model: every dropout that the model and its adapter define; adapter: the adapter's alone; off: none."""


Checkpointing = Literal["none", "selective", "full"]
"""What of the activations is recomputed in the backward pass."""


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
def training_mode(model: PreTrainedModel, *, dropout: Dropout, gradient_checkpointing: Checkpointing) -> Iterator[None]:
    """The modes of a stage: its dropouts, and checkpointing of activations where it is wanted.

    Raises ModelError where the model's layers cannot be checkpointed.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if gradient_checkpointing != "none" and not layers:
        where, remedy = type(model).__name__, "Set `gradient_checkpointing: none`."
        raise ModelError("this model's layers have no gradient checkpointing.", where=where, remedy=remedy)
    before = [layer.gradient_checkpointing for layer in layers]
    with restored_modes(model):
        for layer in layers:
            layer.gradient_checkpointing = gradient_checkpointing != "none"
            # Not transformers' own switch: it makes the embeddings want a gradient, and leaves them so. Reentrant
            # checkpointing would need that, and without it leave lora_B at 0; this kind does not.
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)  # type: ignore[assignment]
        _set_dropout(model, dropout)
        try:
            yield
        finally:
            for layer, value in zip(layers, before, strict=True):
                layer.gradient_checkpointing = value


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
