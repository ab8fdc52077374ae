"""Options that save memory: they save what they promise, and every gradient stays what it was."""

from __future__ import annotations

import shutil
import weakref
from typing import Any

import pytest
import torch
import transformers.models.llama.modeling_llama as llama
from torch import Tensor, nn
from torch._dynamo.eval_frame import _debug_get_cache_entry_list
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.support.models import tiny_model
from tests.support.training import gradients_of
from tests.support.trees import random_tree, random_trees
from tunesmith.engine.engine import Engine
from tunesmith.errors import ModelError
from tunesmith.model.adapters import add_adapter, inner_model
from tunesmith.model.compiled import compile_layers, undo_compile
from tunesmith.model.instances import own_forward
from tunesmith.recipe.models import Lora
from tunesmith.train import activations
from tunesmith.train.activations import Checkpointing
from tunesmith.train.modes import training_mode

SMALL = random_trees(((4, (5, 3)), (2, (4, 6)), (9, (7,))), vocabulary=96)
MIDDLE = random_trees(((70, (50, 40)), (30, (80, 60))), vocabulary=512)
MIDDLE_LLAMA = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "vocab_size": 512,
    "max_position_embeddings": 512,
}


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that were made inside and are still held by anything; the largest value on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        before = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in self._seen | before:
                self._count(leaf.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        number, key = storage.nbytes(), storage._cdata
        self._seen.add(key)
        self.live += number
        self.peak = max(self.peak, self.live)

        def freed() -> None:
            self.live -= number
            self._seen.discard(key)

        weakref.finalize(storage, freed)


def lora_model(family: str = "llama", **config: Any) -> Any:
    model = inner_model(add_adapter(tiny_model(family, **config), Lora(r=4), seed=0))
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05)
    return model


def step(model: Any, kind: Checkpointing, trees: Any, *, offload: bool = False) -> tuple[int, int, dict[str, Tensor]]:
    """Bytes between forward and backward, the peak of both, and the gradients."""
    with training_mode(model, dropout="off", gradient_checkpointing=kind, offload=offload):
        Engine(model).logprobs(trees).logprob_N.sum().backward()  # rotary tables and the like are made once
        model.zero_grad(set_to_none=True)
        with LiveBytes() as memory:
            total = Engine(model).logprobs(trees).logprob_N.sum()
            waiting = memory.live
            total.backward()
    return waiting, memory.peak, gradients_of(Engine(model))


def gradients(model: Any, kind: Checkpointing, trees: Any) -> dict[str, Tensor]:
    """Without a dispatch mode around it: under one, torch runs compiled functions as they were written."""
    with training_mode(model, dropout="off", gradient_checkpointing=kind):
        Engine(model).logprobs(trees).logprob_N.sum().backward()
    return gradients_of(Engine(model))


@pytest.mark.parametrize("middle", [False, True])
@pytest.mark.parametrize("full", [False, True])
def test_none_keeps_more_than_selective_and_that_more_than_full(middle: bool, full: bool) -> None:
    config, trees = (MIDDLE_LLAMA, MIDDLE) if middle else ({}, SMALL)
    model = tiny_model("llama", **config) if full else lora_model(**config)
    kinds: tuple[Checkpointing, ...] = ("none", "selective", "full")
    waiting, peaks, gradients = zip(*(step(model, kind, trees) for kind in kinds), strict=True)
    assert waiting[1] < 0.7 * waiting[0]  # by hand, middle: 11.5 of some 19 hidden states a token and layer
    assert waiting[2] < (0.3 if middle else 0.35) * waiting[1]  # of the tiny one's 2 layers the last is half skipped
    assert peaks[0] > peaks[1] > peaks[2]
    for found in gradients[1:]:
        for name, tensor in gradients[0].items():
            assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("kind", ["selective", "full"])
@pytest.mark.parametrize("family", ["gpt2", "phi", "gemma2", "qwen3", "mixtral", "gpt_neox"])
def test_gradients_of_other_families_are_the_same(family: str, kind: Checkpointing) -> None:
    model = lora_model(family)
    wanted = step(model, "none", SMALL)[2]
    for name, tensor in step(model, kind, SMALL)[2].items():
        assert torch.equal(tensor, wanted[name]), name


class _Changing(nn.Module):
    """A model whose layer changes a product in place, which a selective recomputation would hand on changed."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return y.mul_(2)


def test_a_model_that_changes_products_in_place_is_refused() -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp = _Changing(model.model.layers[1].mlp)
    wanted = step(model, "none", SMALL)[2]
    for name, tensor in step(model, "full", SMALL)[2].items():
        assert torch.equal(tensor, wanted[name])
    with pytest.raises(ModelError, match=r"in place \(aten::mul_"):
        step(model, "selective", SMALL)


@pytest.mark.parametrize("kind", ["none", "selective", "full"])
def test_offloading_moves_large_activations_and_no_weights(
    kind: Checkpointing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU with the CPU as its host: what would be moved, and that it comes back as it was."""
    model = lora_model(**MIDDLE_LLAMA)
    wanted = step(model, kind, MIDDLE)[2]
    limit, moved = 2**16, list[Tensor]()
    real = activations._Moved.of

    def of(tensor: Tensor) -> activations._Moved:
        moved.append(tensor)
        return real(tensor)

    monkeypatch.setattr(activations._Moved, "of", of)
    with training_mode(model, dropout="off", gradient_checkpointing=kind, offload=True):
        Engine(model).logprobs(MIDDLE).logprob_N.sum().backward()
    assert not moved  # nothing to do on a CPU
    model.zero_grad(set_to_none=True)
    monkeypatch.setattr(activations, "_is_large", lambda tensor: tensor.numel() * tensor.element_size() >= limit)
    found = step(model, kind, MIDDLE, offload=True)[2]
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    assert all(tensor.untyped_storage().data_ptr() not in weights for tensor in moved)
    assert len(moved) >= 2 * 4 * (
        1 if kind != "none" else 10
    )  # two steps, four layers: its input, or all that it saves


def test_dropout_is_the_same_when_it_is_recomputed() -> None:
    model = inner_model(add_adapter(tiny_model("llama"), Lora(r=4, dropout=0.5), seed=0))
    wanted: dict[str, Tensor] = {}
    for kind in ("none", "selective", "full"):
        with training_mode(model, dropout="model", gradient_checkpointing=kind):  # type: ignore[arg-type]
            torch.manual_seed(3)
            Engine(model).logprobs(SMALL).logprob_N.sum().backward()
        found = gradients_of(Engine(model))
        wanted = wanted or found
        for name, tensor in wanted.items():
            assert torch.equal(found[name], tensor), (kind, name)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_layers_give_the_same_gradients_and_compile_a_few_times() -> None:
    """30 forests of as many lengths, every kind of checkpointing, with and without gradients: half a minute."""
    model, plain = lora_model(), lora_model()
    assert compile_layers(model) == "compiled: 5 norms, 2 gated layers, 2 rotary embeddings"
    kinds: tuple[Checkpointing, ...] = ("none", "full", "selective")
    for number in range(30):
        trees = [random_tree(3 + number % 5, (2 + number, 4 + 2 * (number % 7)), vocabulary=96, seed=number)]
        found, wanted = gradients(model, kinds[number % 3], trees), gradients(plain, "none", trees)
        for name, tensor in wanted.items():
            assert float((found[name] - tensor).norm()) <= 1e-5 * float(tensor.norm()), (number, name)
    with torch.no_grad():
        values_N, wanted_N = (Engine(each).logprobs(SMALL).logprob_N for each in (model, plain))
    torch.testing.assert_close(values_N, wanted_N, rtol=0, atol=1e-5)
    for function in (llama.LlamaRMSNorm.forward, llama.LlamaMLP.forward, llama.apply_rotary_pos_emb):
        assert 1 <= len(_debug_get_cache_entry_list(function.__code__)) <= 5
    undo_compile(model)
    assert all(own_forward(module) is None for module in model.modules())
    assert gradients(model, "none", SMALL).keys() == wanted.keys()


def test_compiling_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_args: object, **_settings: object) -> Any:
        raise RuntimeError("InvalidCxxCompiler: no working C++ compiler found\nand more")

    monkeypatch.setattr(torch, "compile", fails)
    model = tiny_model("llama")
    with pytest.raises(ModelError, match="does not work on this machine: InvalidCxxCompiler"):
        compile_layers(model)
    assert all(own_forward(module) is None for module in model.modules())
