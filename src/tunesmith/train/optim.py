"""The optimizer: AdamW on float32 weights, decay on matrices, clipping by the global norm.

In: a model whose trained weights want a gradient. Out: the optimizer, its state as named tensors, the gradient norm.
Must not know: data, objectives, files.

The moments are float32, or 8-bit in blocks of 256 (tensors of fewer than 4,096 numbers stay float32), and paged ones
move to the host's memory when the card is full. They are made at once, not in the first step: an optimizer that runs
out of memory in the middle of a step would leave some weights updated and others not.

Sources: Loshchilov and Hutter 2019, arXiv:1711.05101 (decoupled weight decay); Dettmers et al. 2021, arXiv:2110.02861
(8-bit moments), by bitsandbytes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from tunesmith.errors import ModelError, NumericsError
from tunesmith.recipe.extras import need_extra

Trainable = dict[str, nn.Parameter]

OptimizerKind = Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"]

_CLASSES = {"adamw_8bit": "AdamW8bit", "paged_adamw": "PagedAdamW", "paged_adamw_8bit": "PagedAdamW8bit"}
"""The classes of bitsandbytes."""


def trainable_parameters(model: nn.Module) -> Trainable:
    """The weights that want a gradient, by name, each once (tied weights share a name).

    They must be float32: steps of a usual learning rate round away in bfloat16, and the model never moves.
    """
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trainable:
        raise ModelError("no weight is trainable.", where="tuning", remedy="Check `tuning.target_modules`.")
    low = [name for name, parameter in trainable.items() if parameter.dtype != torch.float32]
    if low:
        raise NumericsError(f"{len(low)} trained tensors are not float32, the first is {low[0]}.", where="optimizer")
    return trainable


def make_optimizer(
    trainable: Trainable,
    *,
    kind: OptimizerKind,
    learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
) -> torch.optim.Optimizer:
    """AdamW of a kind, its moments made; the decay spares vectors (norms, biases): they have no scale to shrink.

    Raises MissingExtraError where the kind needs bitsandbytes and it is not installed.
    """
    matrices = [parameter for parameter in trainable.values() if parameter.ndim >= 2]
    vectors = [parameter for parameter in trainable.values() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    optimizer: torch.optim.Optimizer
    if kind == "adamw":
        devices = {parameter.device.type for parameter in trainable.values()}
        optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=devices <= {"cpu", "cuda"})
    else:
        library = need_extra("bitsandbytes", "gpu")
        make = vars(library.optim)[_CLASSES[kind]]
        optimizer = make(groups, lr=learning_rate, betas=betas)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Paged optimizers are not supported on CPU")  # they work, without pages
        _make_state(optimizer)
    return optimizer


def _make_state(optimizer: torch.optim.Optimizer) -> None:
    """All moments, zero, as the optimizer's own first step would make them."""
    for number, group in enumerate(optimizer.param_groups):
        for place, parameter in enumerate(group["params"]):
            if isinstance(optimizer, torch.optim.AdamW):
                optimizer.state[parameter] = _zero_moments(parameter, fused=group["fused"])
            else:
                optimizer.init_state(group, parameter, number, place)  # type: ignore[attr-defined]


def _zero_moments(parameter: nn.Parameter, *, fused: bool) -> dict[str, Tensor]:
    """The fused kernel wants `step` beside the weight, the plain one on the CPU."""
    device = parameter.device if fused else torch.device("cpu")
    return {
        "step": torch.zeros((), dtype=torch.float32, device=device),
        "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
    }


def fill_gradients(parameters: Iterable[nn.Parameter]) -> int:
    """Give zeros to the weights that the step did not reach; returns how many.

    An expert that no token chose has no gradient object, or has one, depending on ranks and splits; zero is its
    gradient either way.
    """
    missing = [parameter for parameter in parameters if parameter.grad is None]
    for parameter in missing:
        parameter.grad = torch.zeros_like(parameter)
    return len(missing)


def gradient_norm(parameters: Iterable[nn.Parameter]) -> float:
    """Euclidean norm of all gradients together, float32."""
    return float(get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None]))


def update(
    optimizer: torch.optim.Optimizer, trainable: Trainable, *, learning_rate: float, norm: float, max_norm: float
) -> None:
    """Clip (0: never), take one step at `learning_rate`, and drop the gradients."""
    assert math.isfinite(norm)
    if max_norm > 0:
        clip_grads_with_norm_(trainable.values(), max_norm, torch.tensor(norm))
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def optimizer_tensors(optimizer: torch.optim.Optimizer, trainable: Trainable) -> dict[str, Tensor]:
    """The whole state of the optimizer as `key.NAME` tensors: the step and the moments of each weight, and for 8-bit
    moments their scales and code books. No two share memory."""
    return {
        f"{key}.{name}": _as_tensor(key, value)
        for name, parameter in trainable.items()
        for key, value in optimizer.state[parameter].items()
    }


def _as_tensor(key: str, value: Tensor | int) -> Tensor:
    """bitsandbytes counts steps in plain numbers, and its weights share one code book."""
    if not isinstance(value, Tensor):
        return torch.tensor(value, dtype=torch.int64)
    return value.clone() if key.startswith("qmap") else value


def restore_optimizer(optimizer: torch.optim.Optimizer, trainable: Trainable, tensors: Mapping[str, Tensor]) -> None:
    """Put saved state back; raises KeyError or ValueError where it is not exactly this optimizer's."""
    states = {name: optimizer.state[parameter] for name, parameter in trainable.items()}
    number = sum(len(state) for state in states.values())
    if len(tensors) != number:
        raise ValueError(f"{len(tensors)} tensors, not {number} for {len(trainable)} weights")
    for name, state in states.items():
        for key, value in state.items():
            saved, wanted = tensors[f"{key}.{name}"], _as_tensor(key, value)
            if (saved.shape, saved.dtype) != (wanted.shape, wanted.dtype):
                raise ValueError(f"moments of {name} do not fit it: {key} is {saved.dtype} {list(saved.shape)}")
    for name, state in states.items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                value.copy_(tensors[f"{key}.{name}"])
            else:
                state[key] = int(tensors[f"{key}.{name}"])
