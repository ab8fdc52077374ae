from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.support.optional import needs_bitsandbytes
from tunesmith.errors import MissingExtraError, ModelError, NumericsError
from tunesmith.train.optim import (
    OptimizerKind,
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


BITSANDBYTES = [
    pytest.param(kind, marks=needs_bitsandbytes) for kind in ("adamw_8bit", "paged_adamw", "paged_adamw_8bit")
]


def make_layers(kind: OptimizerKind) -> tuple[nn.Module, dict[str, nn.Parameter], torch.optim.Optimizer]:
    """Weights of 8,192 numbers, which 8-bit moments take, and of 256, which they do not; biases."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 2))
    trainable = trainable_parameters(layers)
    optimizer = make_optimizer(trainable, kind=kind, learning_rate=1e-2, betas=(0.9, 0.999), weight_decay=0.1)
    return layers, trainable, optimizer


def take_step(
    layers: nn.Module, trainable: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, number: int
) -> None:
    generator = torch.Generator().manual_seed(number)
    layers(torch.randn(8, 64, generator=generator)).pow(2).sum().backward()
    update(optimizer, trainable, learning_rate=1e-2 / number, norm=gradient_norm(trainable.values()), max_norm=1.0)


@pytest.mark.parametrize("kind", ["adamw", *BITSANDBYTES])
def test_restored_state_goes_on_bit_by_bit(kind: OptimizerKind, tmp_path: Path) -> None:
    """Through a file, as a checkpoint does: three steps in one go, and two, a restart and one."""
    layers, trainable, optimizer = make_layers(kind)
    for number in (1, 2):
        take_step(layers, trainable, optimizer, number)
    save_file(optimizer_tensors(optimizer, trainable), tmp_path / "state")
    again, weights, restored = make_layers(kind)
    again.load_state_dict(layers.state_dict())
    restore_optimizer(restored, weights, load_file(tmp_path / "state"))
    take_step(layers, trainable, optimizer, 3)
    take_step(again, weights, restored, 3)
    for name, weight in trainable.items():
        assert weight.equal(weights[name])
    found, expected = optimizer_tensors(restored, weights), optimizer_tensors(optimizer, trainable)
    assert found.keys() == expected.keys()
    assert all(found[name].equal(tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("kind", ["adamw", *BITSANDBYTES])
def test_which_moments_have_8_bits(kind: OptimizerKind) -> None:
    """TRAPS 66: the types after a restart are those before it, and only large tensors are quantized."""
    _, trainable, optimizer = make_layers(kind)
    tensors = optimizer_tensors(optimizer, trainable)
    first = "exp_avg" if kind == "adamw" else "state1"
    types = {name: tensors[f"{first}.{name}"].dtype for name in trainable}
    small = torch.uint8 if kind.endswith("8bit") else torch.float32
    assert types == {
        "0.weight": small,
        "0.bias": torch.float32,
        "1.weight": torch.float32,
        "1.bias": torch.float32,
    }


@pytest.mark.parametrize("kind", BITSANDBYTES)
def test_other_kinds_follow_adamw(kind: OptimizerKind) -> None:
    """Ten steps: the same path, 8 bits within the rounding of a moment's block."""
    ends = []
    for each in ("adamw", kind):
        layers, trainable, optimizer = make_layers(each)
        for number in range(1, 11):
            take_step(layers, trainable, optimizer, number)
        ends.append(torch.cat([weight.detach().flatten() for weight in trainable.values()]))
    start = torch.cat([weight.detach().flatten() for weight in make_layers("adamw")[1].values()])
    error = float((ends[1] - ends[0]).norm() / (ends[0] - start).norm())
    assert error < (0.1 if kind.endswith("8bit") else 1e-4)


@needs_bitsandbytes
def test_one_kind_does_not_go_on_from_another() -> None:
    _, trainable, optimizer = make_layers("adamw")
    tensors = optimizer_tensors(optimizer, trainable)
    _, weights, other = make_layers("paged_adamw")
    with pytest.raises(ValueError, match=r"moments of 0\.weight do not fit"):
        restore_optimizer(other, weights, tensors)


def test_moments_are_there_before_the_first_step() -> None:
    """A step that ran out of memory while it made them would leave some weights updated."""
    layers, trainable, optimizer = make_layers("adamw")
    before = {name: tensor.data_ptr() for name, tensor in optimizer_tensors(optimizer, trainable).items()}
    take_step(layers, trainable, optimizer, 1)
    assert before == {name: tensor.data_ptr() for name, tensor in optimizer_tensors(optimizer, trainable).items()}


def test_eager_moments_are_those_of_torch() -> None:
    """Made at once or in torch's own first step: the same update and state."""
    layers, trainable, optimizer = make_layers("adamw")
    other, weights, lazy = make_layers("adamw")
    lazy.state.clear()
    take_step(layers, trainable, optimizer, 1)
    take_step(other, weights, lazy, 1)
    expected = optimizer_tensors(lazy, weights)
    for name, tensor in optimizer_tensors(optimizer, trainable).items():
        assert tensor.equal(expected[name])
        assert tensor.dtype == expected[name].dtype


def test_without_bitsandbytes_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingExtraError, match=r"tunesmith\[gpu\]"):
        make_layers("adamw_8bit")
