"""Liger's kernels touch one model and nothing else, are checked, and come off again.

liger-kernel needs a GPU; a stand-in with its interface changes files and modules in the very places.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers.models.llama.modeling_llama as llama
from torch import nn

from tests.support.models import tiny_model
from tunesmith.errors import ModelError
from tunesmith.model import kernels
from tunesmith.model.adapters import add_adapter, inner_model
from tunesmith.model.kernels import Choice, apply_kernels, revert_kernels
from tunesmith.recipe.models import Lora

IDS = torch.tensor([[3, 9, 27, 81, 5]])


class StandIn:
    """What `_apply_liger_kernel_to_instance` does to a Llama: files, norms, gated layers, the turning function."""

    def __init__(self, *, wrong: str = "") -> None:
        self.wrong = wrong
        self.turned = self.gated = 0
        self.asked: dict[str, bool] = {}

    def turn(self, q: Any, k: Any, cos: Any, sin: Any, position_ids: Any = None, unsqueeze_dim: int = 1) -> Any:
        self.turned += 1
        return real_turn(q, k, cos, sin, unsqueeze_dim)

    def __call__(self, model: Any, **asked: bool) -> None:
        self.asked = asked
        if model.config.model_type != "llama":
            return
        stand_in = self

        def norm(self: Any, x: torch.Tensor) -> torch.Tensor:
            y = nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps_of_liger)
            return y * 1.1 if stand_in.wrong == "norm" else y

        def gated(self: Any, x: torch.Tensor) -> torch.Tensor:
            stand_in.gated += 1
            down = self.down_proj.base_layer if stand_in.wrong == "adapter" else self.down_proj
            y: torch.Tensor = down(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
            return y

        llama.apply_rotary_pos_emb = self.turn
        llama.LlamaRMSNorm = llama.LlamaMLP = nn.Identity
        llama.LlamaForCausalLM.forward = lambda *_: None
        for module in model.modules():
            if type(module) is real_norm:
                module.eps_of_liger, module.variance_epsilon = module.variance_epsilon, 1e-6
                module.__dict__["forward"] = norm.__get__(module)
                module.__dict__["_get_name"] = lambda: "LigerRMSNorm"
            elif type(module) is real_gated:
                module.__dict__["forward"] = gated.__get__(module)
                module.__dict__["_get_name"] = lambda: "LigerSwiGLUMLP"


real_turn, real_norm, real_gated = llama.apply_rotary_pos_emb, llama.LlamaRMSNorm, llama.LlamaMLP
real_causal = llama.LlamaForCausalLM.forward


def install(monkeypatch: pytest.MonkeyPatch, stand_in: StandIn) -> None:
    for name in ("liger_kernel", "liger_kernel.transformers", "triton"):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.__dict__["_apply_liger_kernel_to_instance"] = stand_in
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(kernels, "_on_gpu", lambda model: True)


def lora_model(family: str = "llama") -> Any:
    return inner_model(add_adapter(tiny_model(family), Lora(r=2), seed=0))


def forwards(model: nn.Module) -> list[dict[str, object]]:
    return [dict(module.__dict__) for module in model.modules()]


def assert_files_are_transformers_own() -> None:
    assert llama.apply_rotary_pos_emb is real_turn
    assert llama.LlamaRMSNorm is real_norm
    assert llama.LlamaMLP is real_gated
    assert llama.LlamaForCausalLM.forward is real_causal


@pytest.mark.parametrize("choice", ["auto", "liger"])
def test_one_model_computes_in_the_kernels_and_no_other(monkeypatch: pytest.MonkeyPatch, choice: Choice) -> None:
    stand_in = StandIn()
    install(monkeypatch, stand_in)
    model = lora_model()
    before = forwards(model)
    line = apply_kernels(model, choice)
    assert line.startswith("kernels: Liger's LigerSwiGLUMLP, LigerRMSNorm, apply_rotary_pos_emb; within ")
    assert stand_in.asked["fused_linear_cross_entropy"] is stand_in.asked["cross_entropy"] is False
    assert_files_are_transformers_own()
    stand_in.turned = stand_in.gated = 0
    with torch.no_grad():
        tiny_model("llama")(input_ids=IDS)
        assert stand_in.turned == stand_in.gated == 0
        model(input_ids=IDS)
    assert (stand_in.turned, stand_in.gated) == (2, 2)  # two layers
    revert_kernels(model)
    assert forwards(model) == before
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, lora_model()(input_ids=IDS).logits)


@pytest.mark.parametrize("wrong", ["norm", "adapter"])
def test_wrong_kernels_come_off_again(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    """A kernel that goes around an adapter gives the right numbers at the start, where lora_B is 0."""
    install(monkeypatch, StandIn(wrong=wrong))
    model = lora_model()
    before = forwards(model)
    line = apply_kernels(model, "auto")
    assert line.startswith("kernels: the model's own (they differ from the model's own by ")
    assert forwards(model) == before
    with pytest.raises(ModelError, match="Liger's kernels cannot be used: they differ"):
        apply_kernels(model, "liger")
    assert forwards(model) == before
    assert_files_are_transformers_own()


def test_what_cannot_be_used_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    assert apply_kernels(model, "torch") == "kernels: the model's own"
    assert apply_kernels(model, "auto") == "kernels: the model's own (they need a CUDA device)"
    with pytest.raises(ModelError, match="they need a CUDA device"):
        apply_kernels(model, "liger")
    monkeypatch.setattr(kernels, "_on_gpu", lambda model: True)
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    assert "not installed: liger_kernel, triton" in apply_kernels(model, "auto")
    monkeypatch.undo()
    install(monkeypatch, StandIn())
    assert apply_kernels(tiny_model("phi"), "auto") == "kernels: the model's own (liger-kernel has none for a phi)"
