"""Every attention backend against the plain forward, log-probs and gradients, for tiny models of many families.

On a CPU the flash kernels are emulated by a loop over the sequences that they are given, and FlexAttention only
computes forwards; with a CUDA device the kernels themselves run.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import PreTrainedModel

from tests.support import flash
from tests.support.flash import spans
from tests.support.models import FAMILIES, tiny_model
from tests.support.trees import random_tree, random_trees
from tunesmith.data.plan import plan_forests
from tunesmith.engine import flex, sdpa, varlen
from tunesmith.engine.engine import Engine
from tunesmith.engine.gradients import farthest
from tunesmith.engine.layout import ForestLayout, Kernel
from tunesmith.engine.logprobs import Logprobs
from tunesmith.engine.parity import check_parity, checked_engine
from tunesmith.engine.plain import plain_logprobs

SHAPES = (  # 1, 2, 4 and 8 branches; empty prompts, with one branch and two; one-token prompts and branches
    (5, (7, 4)),
    (0, (8,)),
    (6, (1, 1)),
    (9, (4,)),
    (3, (2, 5, 1, 4, 3, 6, 2, 2)),
    (0, (3, 5)),
    (1, (1, 9, 2, 1)),
    (12, (11, 10)),
)
TREES = random_trees(SHAPES, vocabulary=96)


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flash kernels as a loop; soft-capping models go through flash-attn's, all others through torch's."""
    monkeypatch.setattr(varlen, "torch_kernel", lambda: flash.varlen_attn)
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=flash.flash_attn_varlen_func))


def _gradients(model: PreTrainedModel, logprobs: Logprobs) -> list[torch.Tensor]:
    weights_N = torch.linspace(-1, 2, len(logprobs.logprob_N), device=logprobs.logprob_N.device)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = torch.autograd.grad((logprobs.logprob_N * weights_N).sum(), parameters, allow_unused=True)
    return [grad for grad in found if grad is not None]


def _relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).detach().abs().max() / want.detach().abs().max())


def _worst_gradient(got: list[torch.Tensor], want: list[torch.Tensor]) -> float:
    scale = max(float(gradient.abs().max()) for gradient in want)
    return max(float((mine - reference).abs().max()) for mine, reference in zip(got, want, strict=True)) / scale


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("family", FAMILIES)
def test_varlen_equals_the_plain_forward(family: str) -> None:
    model = tiny_model(family)
    plain, ours = plain_logprobs(model, TREES), Engine(model, "varlen").logprobs(TREES)
    assert _relative(ours.logprob_N, plain.logprob_N) < 1e-5
    assert _worst_gradient(_gradients(model, ours), _gradients(model, plain)) < 1e-5


@pytest.mark.usefixtures("emulated")
def test_varlen_equals_sdpa_to_float64() -> None:
    model = tiny_model("mistral").double()
    ours, reference = (Engine(model, kernel).logprobs(TREES) for kernel in ("varlen", "sdpa"))
    # Log-probs are float32 by contract, so their rounding is the floor of both.
    assert _relative(ours.logprob_N, reference.logprob_N) < 1e-6
    assert farthest(_gradients(model, ours), _gradients(model, reference)) < 1e-6


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("forest_tokens", [1, 30, 1000])
@pytest.mark.parametrize("order", [1, -1])
def test_varlen_does_not_depend_on_split_or_order(forest_tokens: int, order: int) -> None:
    engine = Engine(tiny_model("mistral"), "varlen")
    with torch.no_grad():
        whole = engine.logprobs(TREES)
        tree_N = whole.tree_B[whole.branch_N]
        for numbers in plan_forests(TREES, forest_tokens):
            part = engine.logprobs([TREES[number] for number in numbers[::order]])
            part_N = part.tree_B[part.branch_N]
            for place, number in enumerate(numbers[::order]):
                mine, reference = part.logprob_N[part_N == place], whole.logprob_N[tree_N == number]
                torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("kernel", ["varlen", "flex"])
def test_a_changed_tree_moves_no_other_by_a_bit(kernel: Kernel) -> None:
    engine = Engine(tiny_model("llama").requires_grad_(False), kernel)
    before = engine.logprobs(TREES[:3])
    after = engine.logprobs([TREES[0], random_tree(0, (8,), vocabulary=96, seed=77), TREES[2]])
    tree_N = before.tree_B[before.branch_N]
    assert torch.equal(before.logprob_N[tree_N != 1], after.logprob_N[tree_N != 1])
    assert not torch.allclose(before.logprob_N[tree_N == 1], after.logprob_N[tree_N == 1], atol=1e-2)


@pytest.mark.usefixtures("emulated")
def test_checkpointed_layers_give_the_same_gradients() -> None:
    model = tiny_model("llama")
    want = _gradients(model, Engine(model, "varlen").logprobs(TREES))
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert _worst_gradient(_gradients(model, Engine(model, "varlen").logprobs(TREES)), want) < 1e-6


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2"])
def test_flex_equals_the_plain_forward(family: str) -> None:
    model = tiny_model(family).requires_grad_(False)
    plain, ours = plain_logprobs(model, TREES), Engine(model, "flex").logprobs(TREES)
    assert _relative(ours.logprob_N, plain.logprob_N) < 1e-5


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (60, None), (None, 0.7), (130, 0.7)])
def test_flex_equals_sdpa_over_many_blocks(window: int | None, softcap: float | None) -> None:
    forest = spans((150, (70, 40, 1)), (0, (30, 90)), (1, (1,)), (20, (25, 140)), (60, (200,)))
    torch.manual_seed(1)
    query, key, value = (torch.randn(1, heads, forest[-1].stop, 16) for heads in (4, 2, 2))
    mine = flex.attend(query, key, value, ForestLayout(forest), scale=0.4, window=window, softcap=softcap)
    reference = sdpa.attend(query, key, value, ForestLayout(forest), scale=0.4, window=window, softcap=softcap)
    torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-5)


def test_flex_reads_on_a_cpu_when_asked_to() -> None:
    engine, report = checked_engine(tiny_model("llama").requires_grad_(False), TREES, attention="flex")
    assert engine.backend == "flex"
    assert report.passed
    assert report.gradient is None


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
WIDE = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
LONG = random_trees(((140, (70, 33)), (5, (260, 1, 90)), (0, (50,)), (1, (3, 300))), vocabulary=96)


def _on_cuda(family: str, dtype: torch.dtype) -> PreTrainedModel:
    model = tiny_model(family, **WIDE, max_position_embeddings=512)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(0.5)  # four times as wide as the other tests' models
    return model.to("cuda", dtype)


@needs_cuda
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "phi3", "gemma2", "gemma3_text"])
@pytest.mark.parametrize(
    ("kernel", "dtype"),
    [
        ("varlen", torch.bfloat16),
        ("varlen", torch.float16),
        ("flex", torch.bfloat16),
        ("flex", torch.float16),
        ("flex", torch.float32),
        ("sdpa", torch.bfloat16),
        ("sdpa", torch.float32),
    ],
)
def test_kernels_on_cuda_equal_the_plain_forward(family: str, kernel: Kernel, dtype: torch.dtype) -> None:
    if kernel == "varlen" and family == "gemma2" and not varlen.has_flash_attn():
        pytest.skip("torch's kernel has no soft-capping, and flash-attn is not installed")
    model = _on_cuda(family, dtype)
    plain, ours = plain_logprobs(model, LONG), Engine(model, kernel).logprobs(LONG)
    limit, gradient_limit = {
        torch.float32: (1e-4, 1e-3),
        torch.bfloat16: (5e-2, 2e-1),
        torch.float16: (1e-2, 5e-2),
    }[dtype]
    assert _relative(ours.logprob_N, plain.logprob_N) < limit
    matrices = [grad.ndim > 1 for grad in _gradients(model, ours)]
    got, want = (
        [grad.float() for grad, is_matrix in zip(_gradients(model, logprobs), matrices, strict=True) if is_matrix]
        for logprobs in (Engine(model, kernel).logprobs(LONG), plain)
    )
    assert farthest(got, want) < gradient_limit


@needs_cuda
@pytest.mark.parametrize("kernel", ["varlen", "flex", "sdpa"])
def test_the_check_passes_on_cuda(kernel: Kernel) -> None:
    if kernel != "sdpa" and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs compute capability 8.0")
    model = _on_cuda("llama", torch.bfloat16)
    report = check_parity(model, LONG, attention=kernel)
    assert report.passed
    assert report.leak == 0


@needs_cuda
def test_flex_compiles_a_kernel_for_all_lengths_on_cuda() -> None:
    from torch._dynamo.utils import counters

    model = _on_cuda("llama", torch.bfloat16)
    Engine(model, "flex").logprobs(LONG).logprob_N.sum().backward()
    Engine(model, "flex").logprobs(LONG[:2]).logprob_N.sum().backward()
    compiled = counters["stats"]["unique_graphs"]
    for number in range(len(LONG)):
        Engine(model, "flex").logprobs(LONG[number:]).logprob_N.sum().backward()
    assert counters["stats"]["unique_graphs"] <= compiled + 1
