"""The fused LoRA layer gives peft's numbers and gradients, and steps aside where it is not the plain case."""

from __future__ import annotations

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
        lambda x, a, b: _LowRankLinear.apply(x, weight_OI, bias_O, a, b, 1.5), (x_TI, a_RI, b_OR)
    )


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
    assert not fused(add_adapter(tiny_model("llama").to(torch.bfloat16), Lora(r=2), seed=0).eval())
    adapted.merge_adapter()
    assert not fused(adapted)
