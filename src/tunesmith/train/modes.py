"""Modes of a model while it trains or is evaluated, and back, whatever happens in between.

In: a model. Out: contexts. Must not know: data, objectives, files.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Literal

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from tunesmith.errors import ModelError
from tunesmith.train.activations import Checkpointing, checkpoint_function, saved_on_host

__all__ = ["Checkpointing", "Dropout", "eval_mode", "restored_modes", "training_mode"]

Dropout = Literal["model", "adapter", "off"]
"""model: every dropout that the model and its adapter define; adapter: the adapter's alone; off: none."""


_FUNCTION = "_gradient_checkpointing_func"
"""Where transformers' layers look for the function that checkpoints them."""


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
def training_mode(
    model: PreTrainedModel, *, dropout: Dropout, gradient_checkpointing: Checkpointing, offload: bool = False
) -> Iterator[None]:
    """The modes of a stage: its dropouts, and what becomes of activations between forward and backward.

    `offload`: what is saved waits in the host's memory; of recomputed layers that is their input (what a selective
    one keeps besides stays on the device). Nothing moves where the model is on the host anyway.
    Raises ModelError where the model's layers cannot be checkpointed.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if gradient_checkpointing != "none" and not layers:
        where, remedy = type(model).__name__, "Set `gradient_checkpointing: none`."
        raise ModelError("this model's layers have no gradient checkpointing.", where=where, remedy=remedy)
    before = [(layer.gradient_checkpointing, layer.__dict__.get(_FUNCTION)) for layer in layers]
    with restored_modes(model), saved_on_host(model) if offload else nullcontext():
        for layer in layers:
            layer.gradient_checkpointing = gradient_checkpointing != "none"
            # Not transformers' own switch: it makes the embeddings want a gradient, and leaves them so. Reentrant
            # checkpointing would need that, and without it leave lora_B at 0; this kind does not.
            layer.__dict__[_FUNCTION] = checkpoint_function(gradient_checkpointing, offload=offload)
        _set_dropout(model, dropout)
        try:
            yield
        finally:
            for layer, (is_on, function) in zip(layers, before, strict=True):
                layer.gradient_checkpointing = is_on
                layer.__dict__.pop(_FUNCTION, None)
                layer.__dict__.update({} if function is None else {_FUNCTION: function})


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
