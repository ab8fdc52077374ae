"""The fused LoRA layer gives peft's numbers and gradients, and steps aside where it is not the plain case."""

from __future__ import annotations

import copy
from typing import Literal

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from tests.support.models import tiny_model
from tests.support.trees import random_trees
from tunesmith.engine.engine import Engine
from tunesmith.model.adapters import add_adapter, inner_model
from tunesmith.model.lora import FusedLinear, _LowRankLinear
from tunesmith.recipe.models import Lora

TREES = random_trees(((4, (5, 3)), (2, (4, 6)), (0, (7,))), vocabulary=96)


def _fill(model: nn.Module) -> None:
    torch.manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.2)


def _result(model: nn.Module) -> tuple[torch.Tensor, list[torch.Tensor]]:
    trained = [parameter for name, parameter in sorted(model.named_parameters()) if "lora_" in name]
    logprob_N = Engine(model).logprobs(TREES).logprob_N  # type: ignore[arg-type]
    return logprob_N.detach(), list(torch.autograd.grad(logprob_N.sum(), trained))


@pytest.mark.parametrize("family", ["llama", "phi", "gpt_neox", "gemma2"])  # phi and gpt_neox have biases
def test_numbers_and_gradients_are_pefts(family: str) -> None:
    fused = inner_model(add_adapter(tiny_model(family), Lora(r=4, alpha=6), seed=0)).eval()
    config = LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM")
    plain = inner_model(get_peft_model(tiny_model(family), config)).eval()
    _fill(fused)
    _fill(plain)
    assert any(isinstance(module, FusedLinear) for module in fused.modules())
    assert not any(isinstance(module, FusedLinear) for module in plain.modules())
    (ours_N, ours), (wanted_N, wanted) = _result(fused), _result(plain)
    torch.testing.assert_close(ours_N, wanted_N, rtol=1e-5, atol=1e-5)
    for mine, reference in zip(ours, wanted, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-5)


def test_the_derivatives_are_right_by_finite_differences() -> None:
    torch.manual_seed(0)
    x_TI, a_RI, b_OR = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((5, 4), (2, 4), (3, 2))
    )
    weight_OI, bias_O = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x, a, b: _LowRankLinear.apply(x, weight_OI, bias_O, a, b, 1.5, None), (x_TI, a_RI, b_OR)
    )


Halves = Literal["bfloat16", "float16"]
LOW = {"bfloat16": 2**-8, "float16": 2**-11}  # half of the distance between neighbours, relative


def _pair(kind: Halves, *, autocast: bool) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The same layer of float32 matrices as ours, peft's, and peft's in float64; the first two on a base of halves."""
    torch.manual_seed(4)
    base = nn.Linear(64, 48, bias=True).to(getattr(torch, kind))
    layers: list[nn.Module] = []
    for fused in (True, False, False):
        model = nn.Sequential(copy.deepcopy(base)).to(torch.float64 if len(layers) == 2 else base.weight.dtype)
        config = LoraConfig(r=8, lora_alpha=16, target_modules=["0"], init_lora_weights=False)
        if fused:
            config._register_custom_module({nn.Linear: FusedLinear})
        torch.manual_seed(5)
        layer = get_peft_model(model, config, autocast_adapter_dtype=True).base_model.model[0]
        layers.append(layer.double() if len(layers) == 2 else layer)
        for parameter in layer.lora_A.parameters():
            assert len(layers) == 3 or parameter.dtype == torch.float32
    if autocast:
        for layer in layers[:2]:
            layer.base_layer.float()
    return layers[0], layers[1], layers[2]


def _run(layer: nn.Module, x_TI: torch.Tensor, kind: Halves, *, autocast: bool) -> list[torch.Tensor]:
    x_TI = x_TI.detach().clone().requires_grad_()
    with torch.autocast("cpu", dtype=getattr(torch, kind), enabled=autocast):
        y_TO = layer(x_TI)
    slope_TO = torch.linspace(-1, 1, y_TO.numel(), dtype=torch.float64).view_as(y_TO).to(y_TO.dtype)
    matrices = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    return [y_TO.detach(), *torch.autograd.grad(y_TO, [x_TI, *matrices], slope_TO)]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_half_precision_is_as_close_to_float64_as_pefts(kind: Halves, autocast: bool) -> None:
    ours, pefts, exact = _pair(kind, autocast=autocast)
    torch.manual_seed(6)
    x_TI = torch.randn(40, 64).to(getattr(torch, kind))
    wanted = _run(exact, x_TI.double(), kind, autocast=False)
    inputs = x_TI.float() if autocast else x_TI
    found, peft_found = (_run(layer, inputs, kind, autocast=autocast) for layer in (ours, pefts))
    assert [each.dtype for each in found] == [each.dtype for each in peft_found]
    assert found[2].dtype == found[3].dtype == torch.float32
    for mine, other, right in zip(found, peft_found, wanted, strict=True):
        error, allowed = (float((each.double() - right).norm() / right.norm()) for each in (mine, other))
        assert error <= max(1.5 * allowed, LOW[kind])


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_sums_of_gradients_are_not_rounded_to_half(kind: Halves) -> None:
    """4,096 tokens that each add 1 to the gradient of B, and one that adds 4,096: in halves ones would be lost."""
    base = nn.Linear(1, 1, bias=False).to(getattr(torch, kind))
    x_T1 = torch.ones(4097, 1).to(base.weight.dtype)
    a_11, b_11 = torch.ones(1, 1, requires_grad=True), torch.zeros(1, 1, requires_grad=True)
    y_T1 = _LowRankLinear.apply(x_T1, base.weight, None, a_11, b_11, 1.0, None)
    grad_T1 = torch.ones_like(y_T1)
    grad_T1[0] = 4096
    y_T1.backward(grad_T1)
    assert b_11.grad is not None
    assert b_11.grad.item() == 8192


def test_the_backward_needs_no_autocast_and_bears_it() -> None:
    layer, _, _ = _pair("bfloat16", autocast=False)
    x_TI = torch.randn(8, 64).bfloat16()
    outside = _run(layer, x_TI, "bfloat16", autocast=False)
    leaf = x_TI.clone().requires_grad_()
    y_TO = layer(leaf)
    slope_TO = torch.linspace(-1, 1, y_TO.numel(), dtype=torch.float64).view_as(y_TO).to(y_TO.dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = torch.autograd.grad(y_TO, [leaf, layer.lora_A["default"].weight], slope_TO)
    assert all(torch.equal(one, other) for one, other in zip(inside, outside[1:], strict=False))


def _saved_bytes(model: nn.Module, weights: nn.Module) -> int:
    """Bytes that autograd keeps of a forward: each storage once, and no weight."""
    known = {each.untyped_storage().data_ptr() for each in (*weights.parameters(), *weights.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    Engine(model).logprobs(TREES)  # type: ignore[arg-type]  # the first forward of a process may keep more
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = Engine(model).logprobs(TREES).logprob_N  # type: ignore[arg-type]
    assert output.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_more_is_saved_than_by_peft(dtype: torch.dtype) -> None:
    fused = inner_model(add_adapter(tiny_model("llama").to(dtype), Lora(r=4, alpha=6), seed=0)).eval()
    config = LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM")
    plain = inner_model(get_peft_model(tiny_model("llama").to(dtype), config)).eval()
    ours, theirs = _saved_bytes(fused, fused), _saved_bytes(plain, plain)
    assert ours <= (1.0 if dtype == torch.float32 else 0.75) * theirs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_new_adapter_on_halves_begins_to_move(dtype: torch.dtype) -> None:
    model = inner_model(add_adapter(tiny_model("llama").to(dtype), Lora(r=4), seed=0)).eval()
    Engine(model).logprobs(TREES).logprob_N.sum().backward()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            assert parameter.grad is not None
            assert parameter.grad.dtype == torch.float32
            assert bool(parameter.grad.abs().max() > 0), name


def test_what_is_not_plain_runs_pefts_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    real = _LowRankLinear.apply
    monkeypatch.setattr(_LowRankLinear, "apply", lambda *args: calls.append("fused") or real(*args))
    ids = torch.tensor([[3, 4, 5]])

    def fused(model: nn.Module) -> bool:
        calls.clear()
        model(input_ids=ids)
        return bool(calls)

    adapted = add_adapter(tiny_model("llama"), Lora(r=2), seed=0)
    assert fused(adapted.eval())
    with adapted.disable_adapter():
        assert not fused(adapted)
    dropped = add_adapter(tiny_model("llama"), Lora(r=2, dropout=0.5), seed=0)
    assert not fused(dropped.train())
    assert fused(dropped.eval())
    assert fused(add_adapter(tiny_model("llama").to(torch.bfloat16), Lora(r=2), seed=0).eval())
    adapted.merge_adapter()
    assert not fused(adapted)
