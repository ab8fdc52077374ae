"""Fused kernels for norms, rotary embeddings and gated layers: Liger's, on a GPU, checked against the model's own.

In: a model, its adapter in place and its forward its own. Out: the same model, some of whose modules compute in
Liger's Triton kernels (Hsu et al. 2024). Must not know: forests, training, recipes.

Nothing but this model changes: Liger also puts its classes and functions into transformers' files, where every model
loaded later would get them, and that is undone at once. Its losses are never used; the engine has its own.
Both sides of the parity check run on these kernels, so it cannot judge them. Hence the check here: hidden states, and
gradients of the inputs and of everything trained, with the kernels and without.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import FunctionType
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tunesmith.errors import ModelError
from tunesmith.model.instances import file_of, forward_calling, give_forward, own_forward
from tunesmith.recipe.extras import need_extra

Choice = Literal["auto", "torch", "liger"]

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}
"""Largest relative difference (Euclidean) of hidden states and gradients: some roundings of the type a layer."""

_PROBE_TOKENS = 48
_ON = {"rope": True, "rms_norm": True, "swiglu": True, "geglu": True, "layer_norm": True}
_OFF = {"cross_entropy": False, "fused_linear_cross_entropy": False}
_ABSENT = object()
_changes: WeakKeyDictionary[nn.Module, dict[str, object]] = WeakKeyDictionary()
"""Of each changed module, what its attributes were."""


def apply_kernels(model: PreTrainedModel, choice: Choice) -> str:
    """Switch to fused kernels where they are wanted and right; returns what is on, for the run's first lines.

    Call it before the engine has the model, which must have its own attention for the check.
    Raises ModelError where `liger` is asked for by name and cannot be used.
    """
    if choice == "torch":
        return "kernels: the model's own"
    reason = _missing(model)
    if reason is None:
        before = _Probe(model)
        names = _apply(model)
        difference = before.difference(model) if names else 0.0
        tolerance = TOLERANCE.get(model.dtype, TOLERANCE[torch.float32])
        if names and difference <= tolerance:
            return f"kernels: Liger's {', '.join(names)}; within {difference:.1e} of the model's own"
        revert_kernels(model)
        reason = f"they differ from the model's own by {difference:.1e} (limit {tolerance:.0e})"
        if not names:
            reason = f"liger-kernel has none for a {model.config.model_type}"
    if choice == "liger":
        raise ModelError(
            f"Liger's kernels cannot be used: {reason}",
            where="model.kernels",
            remedy='Use `kernels: auto` or `torch`; on a GPU: pip install "tunesmith[gpu]"',
        )
    return f"kernels: the model's own ({reason})"


def revert_kernels(model: PreTrainedModel) -> None:
    """Every module as it was before `apply_kernels`."""
    for module in model.modules():
        for name, value in _changes.pop(module, {}).items():
            module.__dict__.pop(name)
            module.__dict__.update({} if value is _ABSENT else {name: value})


def _missing(model: PreTrainedModel) -> str | None:
    """Why Liger cannot run here, or None."""
    if not _on_gpu(model):
        return "they need a CUDA device"
    lacking = [name for name in ("liger_kernel", "triton") if find_spec(name) is None]
    return f"not installed: {', '.join(lacking)}" if lacking else None


def _on_gpu(model: PreTrainedModel) -> bool:
    return model.device.type == "cuda"


def _apply(model: PreTrainedModel) -> list[str]:
    """Let Liger change the modules of this model, and nothing else; the names of what it put there."""
    liger = need_extra("liger_kernel.transformers", "gpu")
    attributes = {module: dict(module.__dict__) for module in model.modules()}
    own = {type(module) for module in model.modules() if type(module).__module__.startswith("transformers.models.")}
    with _files_restored(own) as functions:
        liger._apply_liger_kernel_to_instance(model=model, **_ON, **_OFF)
    names = dict.fromkeys(str(module._get_name()) for module in attributes if "_get_name" in module.__dict__)
    for module, before in attributes.items():
        if type(module) in own and own_forward(module) is before.get("forward"):
            forward = forward_calling(type(module).forward, functions)
            if forward is not None:
                give_forward(module, forward)
                names |= dict.fromkeys(name for name in functions if name in forward.__code__.co_names)
        changed = {
            name: before.get(name, _ABSENT)
            for name, value in module.__dict__.items()
            if value is not before.get(name, _ABSENT)
        }
        if changed:
            _changes[module] = changed
    return list(names)


@contextmanager
def _files_restored(classes: set[type[nn.Module]]) -> Iterator[dict[str, object]]:
    """The files that the classes are from, and the classes, as they were; yields what functions were replaced by."""
    files = {cls.__module__: file_of(cls) for cls in classes}
    before = {name: dict(names) for name, names in files.items()}
    forwards = {cls: cls.forward for cls in classes}
    replaced: dict[str, object] = {}
    try:
        yield replaced
    finally:
        for file, names in files.items():
            changed = {name: value for name, value in before[file].items() if names[name] is not value}
            replaced |= {name: names[name] for name, value in changed.items() if isinstance(value, FunctionType)}
            names |= changed
        for cls, forward in forwards.items():
            if cls.forward is not forward:
                cls.forward = forward


class _Probe:
    """Hidden states of a few random tokens, their gradient, and the norms of the trained weights' gradients."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._hidden, self._slopes, self._norms = _probe(model)

    def difference(self, model: PreTrainedModel) -> float:
        """The largest relative difference from what the model computes now; infinite where it fails."""
        try:
            hidden, slopes, norms = _probe(model)
        except (RuntimeError, ValueError, TypeError, AttributeError, ImportError):
            return float("inf")  # a kernel that does not fit this model, this card or this version of transformers
        pairs = ((hidden, self._hidden), (slopes, self._slopes), (norms, self._norms))
        return max(float((now - before).norm() / before.norm()) for now, before in pairs)


def _probe(model: PreTrainedModel) -> tuple[Tensor, Tensor, Tensor]:
    training = [(module, module.training) for module in model.modules()]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(0, vocabulary, (1, _PROBE_TOKENS), generator=generator).to(model.device)
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    model.eval()
    try:
        with torch.enable_grad():
            hidden = model.base_model(inputs_embeds=embedded, use_cache=False).last_hidden_state
            weights = torch.randn(hidden.shape, generator=generator).to(hidden)
            grads = torch.autograd.grad((hidden * weights).sum(), [embedded, *trained], allow_unused=True)
    finally:
        for module, was_training in training:
            module.training = was_training
    norms = torch.stack([torch.zeros(()) if grad is None else grad.float().norm().cpu() for grad in grads])
    slopes = grads[0]
    assert slopes is not None
    return hidden.detach().float(), slopes.float(), norms
