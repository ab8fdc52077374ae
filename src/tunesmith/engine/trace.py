"""Bytes of a forward and backward pass without computing it: the very code that will run, on tensors without values.

In: a model on the `meta` device, and a function that runs it. Out: the peak of what is alive beside its weights.
Must not know: recipes, machines, what is trained.

torch's FakeTensorMode gives every operation of the CPU its shapes and no memory; a dispatch mode beside it follows
each storage from its first tensor to its last. So activations, chunks of logits, kept directions, recomputed layers
and everything that lives for a moment count as they will, whatever the architecture. What a kernel takes for itself
inside one operation is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tunesmith.data.types import Branch, Tree
from tunesmith.engine.logprobs import TILE_BYTES, TILE_COLUMNS


@dataclass(frozen=True, slots=True)
class Traced:
    """The peak beside the weights, and how much of it were logits (of the vocabulary's width)."""

    peak_bytes: int
    logits_bytes: int


class LiveBytes(TorchDispatchMode):
    """Follows the storages that operations make; those of `known` tensors (weights, gradients) are not counted."""

    def __init__(self, known: Iterable[Tensor], *, vocabulary: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.logits = self.peak = self.peak_logits = 0
        self._vocabulary = vocabulary
        self._known = [tensor.untyped_storage() for tensor in known]  # held, so that no new one gets their address
        self._seen: dict[int, object] = {storage._cdata: storage for storage in self._known}

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """Run the operation and count what it made."""
        if func is torch.ops.aten.nonzero.default and isinstance(args[0], FakeTensor):
            result: object = args[0].new_empty((args[0].numel(), args[0].ndim), dtype=torch.int64)  # as many as can be
        else:
            result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        size = storage.nbytes()
        logits = size if tensor.ndim == 2 and tensor.shape[-1] == self._vocabulary else 0

        def gone(_: object) -> None:
            self.live -= size
            self.logits -= logits
            self._seen.pop(key, None)

        self._seen[key] = weakref.ref(storage, gone)
        self.live += size
        self.logits += logits
        if self.live > self.peak:
            self.peak, self.peak_logits = self.live, self.logits


def trace(run: Callable[[], object], model: nn.Module, *, vocabulary: int = 0) -> Traced:
    """Bytes alive at most while `run()` computes with `model`, its weights, buffers and present gradients apart."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    with LiveBytes([*model.parameters(), *model.buffers(), *gradients], vocabulary=vocabulary) as live:
        run()
    return Traced(live.peak, live.peak_logits)


@contextmanager
def moved_away(model: nn.Module, least_bytes: int) -> Iterator[None]:
    """What autograd saves inside leaves the device until it is read again: all of `least_bytes` and more, but weights.

    The pattern of an offload to the host's memory, whose copies are not counted.
    """
    weights = {each.untyped_storage()._cdata for each in (*model.parameters(), *model.buffers())}

    def pack(tensor: Tensor) -> Tensor | tuple[torch.Size, torch.dtype]:
        small = tensor.numel() * tensor.element_size() < least_bytes
        return tensor if small or tensor.untyped_storage()._cdata in weights else (tensor.shape, tensor.dtype)

    def unpack(packed: Tensor | tuple[torch.Size, torch.dtype]) -> Tensor:
        return packed if isinstance(packed, Tensor) else torch.empty(packed[0], dtype=packed[1])

    with saved_tensors_hooks(pack, unpack):
        yield


def shapes_mode() -> FakeTensorMode:
    """A context whose tensors have shapes and no memory; tensors of one mode belong to no other."""
    return FakeTensorMode(allow_non_fake_inputs=True)


@contextmanager
def tiled_as(device: str) -> Iterator[None]:
    """Logits are made in the tiles of another device inside."""
    before = [(table, table.get("cpu")) for table in (TILE_BYTES, TILE_COLUMNS)]
    try:
        for table, _ in before:
            if device != "cpu":
                table.pop("cpu", None)
        yield
    finally:
        for table, value in before:
            if value is not None:
                table["cpu"] = value


def take_shapes(model: nn.Module) -> None:
    """Put a model of the `meta` device on the CPU, without values; call it inside `shapes_mode()`.

    Tied weights stay tied. Made on `meta` first, because layers cannot change their type without values.
    """
    made: dict[int, tuple[Tensor, Tensor]] = {}

    def twin(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            if isinstance(tensor, nn.Parameter):
                empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
            made[id(tensor)] = (tensor, empty)
        return made[id(tensor)][1]

    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = twin(parameter)  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = twin(buffer)


def shapes_of_trees(trees: Sequence[Tree]) -> list[Tree]:
    """Trees of the same lengths and masks, all of whose tokens are number 0."""
    return [
        Tree(
            tree.id,
            np.zeros(len(tree.prompt_ids), np.int32),
            tuple(Branch(np.zeros(len(branch.ids), np.int32), branch.trained) for branch in tree.branches),
        )
        for tree in trees
    ]
