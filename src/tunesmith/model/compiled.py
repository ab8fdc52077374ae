"""torch.compile for the parts of a model that are many small operations: norms, rotary embeddings, gated layers.

In: a model, its adapter and kernels in place. Out: the same model, whose parts compute in fused loops.
Must not know: forests, training, recipes.

Attention stays as it is: it gets our layout object, which changes with every forest and would be compiled anew each
time. What is compiled is the forward of a class, not of a layer, with sizes left open: a model of 80 layers costs what
one layer costs, and a forest of another length costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from types import FunctionType

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from tunesmith.errors import ModelError
from tunesmith.model.instances import drop_forward, forward_calling, give_forward, own_forward

_ROTARY = "apply_rotary_pos_emb"
"""What transformers' models call the function that turns queries and keys."""


def compile_layers(model: PreTrainedModel) -> str:
    """Compile what can be; returns what that is, for the run's first lines. It happens at the first forward.

    Raises ModelError where this machine has no working compiler, or the model none of these parts.
    """
    _check_compiler(model.device)
    counts = dict.fromkeys(("norms", "gated layers", "rotary embeddings"), 0)
    for kind, module, function in _parts(model):
        give_forward(module, function)
        counts[kind] += 1
    if not any(counts.values()):
        raise ModelError(
            f"nothing of a {type(model).__name__} can be compiled",
            where="model.compile",
            remedy="Set `compile: false`.",
        )
    return "compiled: " + ", ".join(f"{number} {kind}" for kind, number in counts.items() if number)


def undo_compile(model: PreTrainedModel) -> None:
    """The classes' own forwards again."""
    for _, module, function in _parts(model, given=True):
        if own_forward(module) == function.__get__(module):
            drop_forward(module)


def _parts(model: PreTrainedModel, *, given: bool = False) -> Iterator[tuple[str, nn.Module, Callable[..., object]]]:
    """What to compile, with its compiled forward; modules with a forward of their own are left alone unless `given`."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    gated = {id(layer.mlp) for layer in layers if isinstance(dict(layer.named_children()).get("mlp"), nn.Module)}
    for module in model.base_model.modules():
        if own_forward(module) is not None and not given:
            continue  # a fused kernel's
        cls = type(module)
        if cls.__name__.endswith("Norm") and not cls.__module__.startswith("torch.") and not list(module.children()):
            yield "norms", module, _compiled(cls.forward)
        elif id(module) in gated and all(_is_simple(child) for child in module.children()):
            yield "gated layers", module, _compiled(cls.forward)
        elif (turning := _turning(cls.forward)) is not None:
            yield "rotary embeddings", module, turning


def _is_simple(part: nn.Module) -> bool:
    """A plain linear layer, with or without an adapter, or a function without weights. Quantized products and experts
    are operations of their own, between which there is little to fuse."""
    base = part.get_base_layer() if isinstance(part, LoraLayer) else part
    return type(base) is nn.Linear or not list(base.parameters())


@cache
def _compiled(forward: Callable[..., object]) -> Callable[..., object]:
    function: Callable[..., object] = torch.compile(forward, dynamic=True)
    return function


@cache
def _turning(forward: Callable[..., object]) -> Callable[..., object] | None:
    """The forward of an attention class, turning queries and keys in one compiled function; None for other classes."""
    turn = forward.__globals__.get(_ROTARY) if isinstance(forward, FunctionType) else None
    return None if turn is None else forward_calling(forward, {_ROTARY: _compiled(turn)})


def _check_compiler(device: torch.device) -> None:
    """Compile a function of one line: headers, compilers and drivers are missing in many ways."""

    def probe(x: Tensor) -> Tensor:
        return x.sin() + 1

    try:
        torch.compile(probe, dynamic=True)(torch.ones(3, device=device))
    except Exception as problem:  # whatever a compiler throws, the answer is the same
        lines = [line for line in str(problem).splitlines() if line.strip()]
        raise ModelError(
            f"torch.compile does not work on this machine: {lines[0] if lines else type(problem).__name__}",
            where="model.compile",
            remedy="Install a C++ compiler (on a GPU also triton), or set `compile: false`.",
        ) from problem
