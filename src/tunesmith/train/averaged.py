"""Optimizers whose result is not the point that is trained: schedule-free ones hand on an average of their steps.

In: an optimizer, the trained weights. Out: the weights as they are handed on, inside a context or for good; what a
checkpoint needs besides the moments. Must not know: which steps are evaluated or saved.

Gradients are taken at y, the result is x, and x = y + (1 - 1 / beta1) (z - y) (Defazio et al. 2024, arXiv:2405.15682,
equation 4). Going to x and back rounds, so y is kept aside: evaluations and saves leave no trace in the training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_NUMBERS = ("k", "weight_sum", "lr_max")
"""What the package counts for each group, beside the state of each weight."""


def is_averaging(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer is schedule-free: the package marks its groups so."""
    return "train_mode" in optimizer.param_groups[0]


@contextmanager
def averaged(optimizer: torch.optim.Optimizer, trainable: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """The weights as the stage hands them on, inside; afterwards bit by bit as they were."""
    if not is_averaging(optimizer):
        yield
        return
    before = {name: parameter.detach().clone() for name, parameter in trainable.items()}
    settle(optimizer)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, parameter in trainable.items():
                parameter.copy_(before[name])
        for group in optimizer.param_groups:
            group["train_mode"] = True


def settle(optimizer: torch.optim.Optimizer) -> None:
    """The weights as the stage hands them on, for good: no step follows."""
    if is_averaging(optimizer):
        optimizer.eval()  # type: ignore[attr-defined]


def averaging_tensors(optimizer: torch.optim.Optimizer, trainable: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The point that is trained, as `y.NAME`, and the groups' numbers, as `group.N`; nothing of other optimizers."""
    if not is_averaging(optimizer):
        return {}
    points = {f"y.{name}": parameter.detach().clone() for name, parameter in trainable.items()}
    numbers = {
        f"group.{number}": torch.tensor([float(group[name]) for name in _NUMBERS], dtype=torch.float64)
        for number, group in enumerate(optimizer.param_groups)
    }
    return points | numbers


@torch.no_grad()
def restore_averaging(
    optimizer: torch.optim.Optimizer, trainable: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Go on at the point that was trained. Raises KeyError or ValueError where it is not this stage's."""
    if not is_averaging(optimizer):
        return
    for name, parameter in trainable.items():
        if tensors[f"y.{name}"].shape != parameter.shape:
            raise ValueError(f"y.{name} does not fit it")
        parameter.copy_(tensors[f"y.{name}"])
    for number, group in enumerate(optimizer.param_groups):
        k, weight_sum, lr_max = tensors[f"group.{number}"].tolist()
        group.update(k=int(k), weight_sum=weight_sum, lr_max=lr_max, train_mode=True)
