"""The optimizer of a stage: groups of float32 weights, decay on matrices, clipping by the global norm.

In: the trained weights. Out: the optimizer (`optim_kinds` knows which there are), its state as named tensors, the
gradient norm. Must not know: data, objectives, files.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from tunesmith.errors import ModelError, NumericsError
from tunesmith.recipe.tuning import Optimizer as OptimizerKind
from tunesmith.train.averaged import averaging_tensors, restore_averaging
from tunesmith.train.optim_kinds import Group, optimizer_of

__all__ = [
    "OptimizerKind",
    "Trainable",
    "fill_gradients",
    "gradient_norm",
    "make_optimizer",
    "optimizer_tensors",
    "restore_optimizer",
    "trainable_parameters",
    "update",
]

Trainable = dict[str, nn.Parameter]


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
    b_lr_ratio: float = 1.0,
    tables: Collection[int] = (),
) -> torch.optim.Optimizer:
    """An optimizer of a kind, its state made; the decay spares vectors (norms, biases): they have no scale to shrink.

    `b_lr_ratio`: learning rate of adapters' B matrices over that of all others (LoRA+, Hayou et al. 2024,
    arXiv:2402.12354). `tables`: ids of the weights that are looked up by token (embeddings, head), which Muon leaves to
    AdamW. Raises MissingExtraError where the kind needs a package that is not installed.
    """
    alike: dict[tuple[bool, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in trainable.items():
        is_second = b_lr_ratio != 1.0 and "lora_B" in name.split(".")
        is_other = kind == "muon" and (id(parameter) in tables or parameter.ndim != 2)
        alike.setdefault((parameter.ndim < 2, is_second, is_other), []).append(parameter)
    groups: list[Group] = [
        {
            "params": parameters,
            "weight_decay": 0.0 if is_vector else weight_decay,
            "lr_ratio": b_lr_ratio if is_second else 1.0,
            "is_matrix": not is_vector and not is_other,
        }
        for (is_vector, is_second, is_other), parameters in sorted(alike.items(), key=lambda each: each[0])
    ]
    return optimizer_of(kind, groups, learning_rate=learning_rate, betas=betas)


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
        group["lr"] = learning_rate * group["lr_ratio"]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def optimizer_tensors(optimizer: torch.optim.Optimizer, trainable: Trainable) -> dict[str, Tensor]:
    """The whole state of the optimizer as `key.NAME` tensors: the step and the moments of each weight, for 8-bit
    moments their scales and code books, and what schedule-free ones have besides. No two share memory."""
    state = {
        f"{key}.{name}": _as_tensor(key, value)
        for name, parameter in trainable.items()
        for key, value in optimizer.state[parameter].items()
    }
    return state | averaging_tensors(optimizer, trainable)


def _as_tensor(key: str, value: Tensor | int) -> Tensor:
    """bitsandbytes counts steps in plain numbers, and its weights share one code book."""
    if not isinstance(value, Tensor):
        return torch.tensor(value, dtype=torch.int64)
    return value.clone() if key.startswith("qmap") else value


def restore_optimizer(optimizer: torch.optim.Optimizer, trainable: Trainable, tensors: Mapping[str, Tensor]) -> None:
    """Put saved state back; raises KeyError or ValueError where it is not exactly this optimizer's."""
    states = {name: optimizer.state[parameter] for name, parameter in trainable.items()}
    number = sum(len(state) for state in states.values()) + len(averaging_tensors(optimizer, trainable))
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
    restore_averaging(optimizer, trainable, tensors)
