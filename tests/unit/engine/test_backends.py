"""Which kernels are tried on which device, for which model, and what is said of the others."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.support.models import tiny_model
from tunesmith.engine.backends import (
    Attention,
    DeviceFacts,
    ModelFacts,
    candidates,
    no_forests,
    num_positions,
    usable,
)
from tunesmith.errors import ModelError

H100 = DeviceFacts("cuda", (9, 0), has_varlen=True)
T4 = DeviceFacts("cuda", (7, 5), has_varlen=True, has_flash_attn=True)
MPS, CPU = DeviceFacts("mps"), DeviceFacts("cpu")
BF16 = ModelFacts(torch.bfloat16, 128)
GEMMA2 = replace(BF16, head_size=256, soft_capped=True)


@pytest.mark.parametrize(
    ("device", "model", "kernels"),
    [
        (H100, BF16, ["varlen", "flex", "sdpa"]),
        (H100, replace(BF16, dtype=torch.float16), ["varlen", "flex", "sdpa"]),
        (H100, replace(BF16, dtype=torch.float32), ["sdpa"]),
        (H100, replace(BF16, head_size=80), ["varlen", "flex", "sdpa"]),  # Phi-2
        (H100, replace(BF16, head_size=None), ["varlen", "flex", "sdpa"]),  # unknown: the parity check will tell
        (H100, replace(BF16, head_size=100), ["flex", "sdpa"]),
        (H100, replace(BF16, head_size=512), ["flex", "sdpa"]),
        (H100, replace(BF16, head_size=8), ["varlen", "sdpa"]),
        (H100, GEMMA2, ["flex", "sdpa"]),
        (replace(H100, has_flash_attn=True), GEMMA2, ["varlen", "flex", "sdpa"]),
        (replace(H100, has_varlen=False), BF16, ["flex", "sdpa"]),
        (replace(H100, has_varlen=False, has_flash_attn=True), BF16, ["varlen", "flex", "sdpa"]),
        (replace(H100, capability=(8, 0)), BF16, ["varlen", "flex", "sdpa"]),
        (T4, replace(BF16, dtype=torch.float16), ["sdpa"]),
        (MPS, replace(BF16, dtype=torch.float16), ["sdpa"]),
        (CPU, replace(BF16, dtype=torch.float32), ["sdpa"]),
        (CPU, replace(BF16, trained=False), ["sdpa"]),
    ],
)
def test_auto_tries_the_fastest_first(device: DeviceFacts, model: ModelFacts, kernels: list[str]) -> None:
    found, left_out = candidates("auto", device, model)
    assert found == kernels
    assert {kernel for kernel, _ in left_out} == {"varlen", "flex", "sdpa"} - set(kernels)
    assert all(reason for _, reason in left_out)


@pytest.mark.parametrize(
    ("attention", "device", "model", "reason"),
    [
        ("varlen", CPU, BF16, "needs a CUDA device"),
        ("varlen", T4, BF16, "this card has 7.5"),
        ("varlen", H100, replace(BF16, dtype=torch.float32), "computes in float32"),
        ("varlen", H100, GEMMA2, "flash-attn"),
        ("varlen", H100, replace(BF16, head_size=100), "this model's have 100"),
        ("varlen", replace(H100, has_varlen=False), BF16, "torch 2.11"),
        ("flex", CPU, BF16, "no backward on a CPU"),
        ("flex", T4, BF16, "this card has 7.5"),
        ("flex", MPS, BF16, "needs a CUDA device"),
        ("flex", H100, replace(BF16, head_size=8), "at least 16"),
    ],
)
def test_a_named_kernel_that_cannot_run_is_refused_with_the_reason_and_another(
    attention: Attention, device: DeviceFacts, model: ModelFacts, reason: str
) -> None:
    with pytest.raises(ModelError, match=reason) as refused:
        candidates(attention, device, model)
    assert "model.attention" in str(refused.value)
    assert "attention: sdpa" in str(refused.value)


def test_a_named_kernel_is_the_only_one_tried() -> None:
    assert candidates("flex", H100, replace(BF16, dtype=torch.float32)) == (["flex"], [])
    assert candidates("flex", CPU, replace(BF16, trained=False)) == (["flex"], [])
    assert candidates("sdpa", H100, BF16) == (["sdpa"], [])
    assert candidates("plain", H100, BF16) == ([], [])


def test_facts_of_models() -> None:
    llama, gemma2 = tiny_model("llama"), tiny_model("gemma2")
    assert ModelFacts.of(llama) == ModelFacts(torch.float32, 8)  # hidden size 32, 4 heads
    assert ModelFacts.of(gemma2) == ModelFacts(torch.float32, 8, soft_capped=True)
    assert ModelFacts.of(tiny_model("gpt2")).head_size == 8  # it calls them n_embd and n_head
    assert not ModelFacts.of(llama.requires_grad_(False)).trained
    assert ModelFacts.of(llama, autocast=torch.bfloat16).dtype == torch.bfloat16
    assert usable(llama)[-1] == ("sdpa", "")


def test_models_that_no_kernel_can_run_as_forests() -> None:
    assert no_forests(tiny_model("gemma2"), 128) == ""
    assert "conv" in no_forests(tiny_model("lfm2", layer_types=["conv", "full_attention"]), 10)
    assert "sinks" in no_forests(tiny_model("gpt_oss", num_local_experts=4, num_experts_per_tok=2), 10)
    chunks = tiny_model("llama")
    chunks.config.update({"layer_types": ["chunked_attention", "full_attention"], "attention_chunk_size": 32})
    assert no_forests(chunks, 32) == ""
    assert "chunks of 32 tokens, and the longest row has 33" in no_forests(chunks, 33)


def test_tables_of_positions() -> None:
    assert num_positions(tiny_model("gpt2")) == 64
    assert num_positions(tiny_model("opt", ffn_dim=48, word_embed_proj_dim=32)) == 128
    assert num_positions(tiny_model("llama")) is None
