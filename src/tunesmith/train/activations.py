"""Which activations wait in memory for the backward pass: all, the expensive ones, none; on the device or the host.

In: the layers of a model, whose forwards are wrapped. Out: functions that transformers' layers take for checkpointing,
and a context that moves what autograd saves. Must not know: data, objectives, recipes, optimizers.

Recomputation is torch's non-reentrant checkpointing (Chen et al. 2016, "Training Deep Nets with Sublinear Memory
Cost"); `selective` is its policy form: what took a matrix product or an attention to make is kept, and norms, rotary
embeddings and gates, which are most of the memory and little of the time, are made again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from tunesmith.errors import ModelError

Checkpointing = Literal["none", "selective", "full"]
"""What of the activations is recomputed in the backward pass."""

_PRODUCTS = {"aten::mm", "aten::addmm", "aten::_grouped_mm", "aten::_scaled_mm", "bitsandbytes::gemm_4bit"}
"""Products with weights. Not aten::bmm: it also makes the scores of an attention without a kernel, [A, T, T]."""

SMALL_BYTES = 2**20
"""Smaller tensors stay on the device: moving them costs more time than they take room."""


class _Kept:
    """The policy of one layer's forward; it remembers what it keeps, so that nothing of it is changed unseen."""

    def __init__(self) -> None:
        self._storages: set[int] = set()

    def __call__(
        self, context: SelectiveCheckpointContext, op: OpOverload, *args: object, **kwargs: object
    ) -> CheckpointPolicy:
        name = op.name()
        if isinstance(op, OpOverload) and op._schema.is_mutable:
            return self._of_change(op, args, kwargs)
        if name.split(".")[0] not in _PRODUCTS and "attention" not in name and "attn" not in name:
            return CheckpointPolicy.PREFER_RECOMPUTE
        outputs = context.op_output if isinstance(context.op_output, tuple) else (context.op_output,)
        self._storages |= {each.untyped_storage()._cdata for each in outputs if isinstance(each, Tensor)}
        return CheckpointPolicy.MUST_SAVE

    def _of_change(self, op: OpOverload, args: tuple[object, ...], kwargs: dict[str, object]) -> CheckpointPolicy:
        """An operation that writes into its arguments, compiled code's products among them, is done again; but what
        is kept must not change, or the recomputation would begin with the changed values."""
        arguments = op._schema.arguments
        written = [
            args[number] if number < len(args) else kwargs.get(argument.name)
            for number, argument in enumerate(arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        if not any(isinstance(each, Tensor) and each.untyped_storage()._cdata in self._storages for each in written):
            return CheckpointPolicy.PREFER_RECOMPUTE
        if op is torch.ops.aten.addmm_.default:
            return CheckpointPolicy.MUST_SAVE  # a LoRA layer adds to its product: what is kept already has the sum
        raise ModelError(
            f"this model changes the result of a matrix product in place ({op.name()})",
            where="gradient_checkpointing",
            remedy="Use `gradient_checkpointing: full` or `none`.",
        )


def _selective_contexts() -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
    contexts: tuple[AbstractContextManager[object], AbstractContextManager[object]]
    contexts = create_selective_checkpoint_contexts(_Kept(), allow_cache_entry_mutation=True)
    return contexts


def checkpoint_function(kind: Checkpointing, *, offload: bool) -> Callable[..., object]:
    """What a transformers layer calls with its forward and its inputs instead of the forward itself."""
    context = {"context_fn": _selective_contexts} if kind == "selective" else {}
    function: Callable[..., object] = partial(checkpoint, use_reentrant=False, **context)  # type: ignore[arg-type]
    return partial(_with_input_on_host, function) if offload else function


def _is_large(tensor: Tensor) -> bool:
    return tensor.device.type != "cpu" and tensor.numel() * tensor.element_size() >= SMALL_BYTES


@dataclass(slots=True, eq=False)
class _Moved:
    """A tensor's copy in the host's memory, page-locked so that the copy runs beside the computation."""

    host: Tensor
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> _Moved:
        """Copy; the order of the device's stream keeps it right while the original is freed."""
        pinned = torch.cuda.is_available()
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
        return cls(host.copy_(tensor, non_blocking=pinned), tensor.device)

    def back(self) -> Tensor:
        """On its device again."""
        return self.host.to(self.device, non_blocking=True)


def _with_input_on_host(function: Callable[..., object], forward: Callable[..., object], *inputs: object) -> object:
    """Checkpoint `forward`, its first input (a layer's hidden states) waiting in the host's memory.

    torch keeps a region's inputs for the recomputation, whose results are matched by order alone: so the input can be
    another tensor of the same values then.
    """
    first, *others = inputs
    if not torch.is_grad_enabled() or not isinstance(first, Tensor) or not _is_large(first):
        return function(forward, *inputs)
    held: list[Tensor | _Moved] = [first]
    wants_grad = first.requires_grad

    def region(_anchor: Tensor, *rest: object) -> object:
        value = held[0]
        return forward(value if isinstance(value, Tensor) else value.back().requires_grad_(wants_grad), *rest)

    # torch finds the generators whose state dropout needs again by the devices of the inputs
    output = function(region, first.new_empty(0), *others)
    held[0] = _Moved.of(first.detach())
    return output


@contextmanager
def saved_on_host(model: nn.Module) -> Iterator[None]:
    """What autograd saves inside waits in the host's memory: large tensors of the device that are no weights."""
    weights = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers())}

    def pack(tensor: Tensor) -> Tensor | _Moved:
        if not _is_large(tensor) or tensor.untyped_storage().data_ptr() in weights:
            return tensor
        return _Moved.of(tensor)

    def unpack(packed: Tensor | _Moved) -> Tensor:
        return packed if isinstance(packed, Tensor) else packed.back()

    with saved_tensors_hooks(pack, unpack):
        yield
