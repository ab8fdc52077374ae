from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tunesmith.errors import ModelError, NumericsError
from tunesmith.train.optim import (
    fill_gradients,
    gradient_norm,
    make_optimizer,
    optimizer_tensors,
    restore_optimizer,
    trainable_parameters,
    update,
)


def test_first_adamw_step_by_hand() -> None:
    """Bias correction makes the first step lr * sign(gradient); the decay of a matrix is lr * decay * weight."""
    layer = nn.Linear(1, 1)
    with torch.no_grad():
        layer.weight.fill_(2.0)
        layer.bias.fill_(2.0)
    trainable = trainable_parameters(layer)
    optimizer = make_optimizer(trainable, kind="adamw", learning_rate=9.0, betas=(0.9, 0.999), weight_decay=0.5)
    for parameter in trainable.values():
        parameter.grad = torch.full_like(parameter, 0.3)
    update(optimizer, trainable, learning_rate=0.1, norm=1.0, max_norm=0.0)
    assert layer.weight.item() == pytest.approx(2.0 - 0.1 * 0.5 * 2.0 - 0.1, abs=1e-6)
    assert layer.bias.item() == pytest.approx(2.0 - 0.1, abs=1e-6)  # no decay on vectors
    assert layer.weight.grad is None


def test_clipping_by_hand() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    norm = gradient_norm([parameter])
    assert norm == 5.0
    # plain SGD cannot be asked for, so look at the first moment: 0.1 * clipped gradient
    optimizer = make_optimizer({"p": parameter}, kind="adamw", learning_rate=0.1, betas=(0.9, 0.999), weight_decay=0.0)
    update(optimizer, {"p": parameter}, learning_rate=0.1, norm=norm, max_norm=1.0)
    assert optimizer.state[parameter]["exp_avg"].tolist() == pytest.approx([0.06, 0.08], rel=1e-5)


def test_weights_and_moments_are_float32() -> None:
    layer = nn.Linear(2, 2)
    trainable = trainable_parameters(layer)
    optimizer = make_optimizer(trainable, kind="adamw", learning_rate=0.1, betas=(0.9, 0.999), weight_decay=0.0)
    layer(torch.ones(1, 2)).sum().backward()
    update(optimizer, trainable, learning_rate=0.1, norm=1.0, max_norm=1.0)
    tensors = optimizer_tensors(optimizer, trainable)
    assert set(tensors) == {f"{key}.{name}" for key in ("step", "exp_avg", "exp_avg_sq") for name in ("weight", "bias")}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_bfloat16_master_weights_are_refused() -> None:
    with pytest.raises(NumericsError, match="2 trained tensors are not float32, the first is weight"):
        trainable_parameters(nn.Linear(2, 2, dtype=torch.bfloat16))


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(ModelError, match="no weight is trainable"):
        trainable_parameters(nn.Linear(2, 2).requires_grad_(False))


def test_tied_weights_are_one() -> None:
    pair = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    pair["b"].weight = pair["a"].weight
    assert list(trainable_parameters(pair)) == ["a.weight"]


def test_unreached_weights_get_zeros() -> None:
    parameter = nn.Parameter(torch.ones(2))
    assert fill_gradients([parameter]) == 1
    assert parameter.grad is not None
    assert parameter.grad.tolist() == [0.0, 0.0]
    assert fill_gradients([parameter]) == 0


def test_not_finite_norm_is_never_applied() -> None:
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.tensor([math.nan, 1.0])
    optimizer = make_optimizer({"p": parameter}, kind="adamw", learning_rate=0.1, betas=(0.9, 0.999), weight_decay=0.0)
    with pytest.raises(AssertionError):
        update(optimizer, {"p": parameter}, learning_rate=0.1, norm=gradient_norm([parameter]), max_norm=1.0)
    assert parameter.tolist() == [1.0, 1.0]


def test_state_of_another_shape_or_with_a_gap_is_refused() -> None:
    layer = nn.Linear(2, 2)
    trainable = trainable_parameters(layer)
    optimizer = make_optimizer(trainable, kind="adamw", learning_rate=0.1, betas=(0.9, 0.999), weight_decay=0.0)
    layer(torch.ones(1, 2)).sum().backward()
    update(optimizer, trainable, learning_rate=0.1, norm=1.0, max_norm=1.0)
    tensors = optimizer_tensors(optimizer, trainable)
    with pytest.raises(ValueError, match="5 tensors"):
        restore_optimizer(optimizer, trainable, {key: tensors[key] for key in sorted(tensors)[1:]})
    with pytest.raises(ValueError, match="moments of weight"):
        restore_optimizer(optimizer, trainable, tensors | {"exp_avg.weight": torch.zeros(3)})
    with pytest.raises(KeyError):
        restore_optimizer(optimizer, trainable, {f"x{key}": value for key, value in tensors.items()})
