"""The optimizer: AdamW on float32 weights with float32 moments, decay on matrices, clipping by the global norm.

In: a model whose trained weights want a gradient. Out: the optimizer, its state as named tensors, the gradient norm.
Must not know: data, objectives, files.

Source: Loshchilov and Hutter 2019, arXiv:1711.05101 (decoupled weight decay).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from tunesmith.errors import ModelError, NumericsError

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


def make_adamw(
    trainable: Trainable, *, learning_rate: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.AdamW:
    """AdamW whose decay spares vectors (norms, biases): they have no scale to shrink."""
    matrices = [parameter for parameter in trainable.values() if parameter.ndim >= 2]
    vectors = [parameter for parameter in trainable.values() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    devices = {parameter.device.type for parameter in trainable.values()}
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=devices <= {"cpu", "cuda"})


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
    optimizer: torch.optim.AdamW, trainable: Trainable, *, learning_rate: float, norm: float, max_norm: float
) -> None:
    """Clip (0: never), take one step at `learning_rate`, and drop the gradients."""
    assert math.isfinite(norm)
    if max_norm > 0:
        clip_grads_with_norm_(trainable.values(), max_norm, torch.tensor(norm))
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def optimizer_tensors(optimizer: torch.optim.AdamW, trainable: Trainable) -> dict[str, Tensor]:
    """The whole state of the optimizer as `key.NAME` tensors: step, exp_avg, exp_avg_sq of each weight."""
    return {
        f"{key}.{name}": tensor
        for name, parameter in trainable.items()
        for key, tensor in optimizer.state[parameter].items()
    }


def restore_optimizer(optimizer: torch.optim.AdamW, trainable: Trainable, tensors: Mapping[str, Tensor]) -> None:
    """Put saved state back; raises KeyError or ValueError where it is not exactly this optimizer's."""
    keys = ("step", "exp_avg", "exp_avg_sq")
    if len(tensors) != len(keys) * len(trainable):
        raise ValueError(f"{len(tensors)} tensors, not {len(keys)} for each of {len(trainable)} weights")
    for name, parameter in trainable.items():
        state = {key: tensors[f"{key}.{name}"] for key in keys}
        if any(state[key].shape != parameter.shape or state[key].dtype != torch.float32 for key in keys[1:]):
            raise ValueError(f"moments of {name} do not fit it")
        on_device = {key: tensor.to(parameter.device, copy=True) for key, tensor in state.items()}
        # The fused kernel wants `step` beside the weight; there as here it is a float32 scalar.
        optimizer.state[parameter] = on_device
