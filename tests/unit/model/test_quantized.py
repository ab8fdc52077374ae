"""Quantized bases: trained, saved, read and merged as the very weights they stand for (TRAPS 56)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.support.folders import make_model_folder
from tests.support.trees import random_trees
from tunesmith.engine.engine import Engine
from tunesmith.errors import ModelError
from tunesmith.model.adapters import inner_model
from tunesmith.model.load import load_model
from tunesmith.model.policy import (
    Policy,
    Weights,
    merged_model,
    policy_for_reading,
    policy_for_training,
    save_policy,
)
from tunesmith.model.quantized import Quantization, is_quantized, matrix, quantized_layers
from tunesmith.recipe.models import Full, Lora, Model
from tunesmith.train.modes import training_mode

pytest.importorskip("bitsandbytes", reason='needs bitsandbytes: pip install "tunesmith[gpu]"')
CPU = torch.device("cpu")
LORA = Lora(r=4, alpha=6)
TREES = random_trees(((4, (5, 3)), (2, (4, 6)), (0, (7,))), vocabulary=96)
both = pytest.mark.parametrize("kind", ["nf4", "int8"])


def _weights(folder: Path, kind: Quantization) -> Weights:
    path = folder / "base"
    if not path.is_dir():
        make_model_folder(path)
    return Weights(Model(path=str(path), quantization=kind))


def _fill(model: nn.Module) -> None:
    torch.manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.2)


def _logprobs(model: PreTrainedModel) -> Tensor:
    return Engine(model).logprobs(TREES).logprob_N


def _run(model: PreTrainedModel) -> tuple[Tensor, list[Tensor], int]:
    """Log-probs, the gradients of the adapter, and the bytes that autograd keeps beside the weights."""
    known = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage
        return tensor

    trained = [parameter for name, parameter in sorted(model.named_parameters()) if "lora_" in name]
    _logprobs(model)  # the first forward of a process may differ in what it keeps of attention
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logprob_N = _logprobs(model)
    grads = list(torch.autograd.grad(logprob_N.sum(), trained))
    return logprob_N.detach(), grads, sum(storage.nbytes() for storage in kept.values())


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_and_gradients_are_pefts_for_fewer_bytes(
    tmp_path: Path, kind: Quantization, dtype: torch.dtype
) -> None:
    weights = _weights(tmp_path, kind)
    named = "float32" if dtype == torch.float32 else "bfloat16"
    weights = Weights(weights.full.model_copy(update={"dtype": named}))
    fused = policy_for_training(weights, LORA, device=CPU, seed=0).model
    config = LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM")
    plain = inner_model(get_peft_model(load_model(weights.full, device=CPU, dtype=dtype), config)).eval()
    assert sum(type(module).__name__.startswith("Fused") for module in fused.modules()) == 14
    _fill(fused)
    _fill(plain)
    (ours_N, ours, our_bytes), (theirs_N, theirs, their_bytes) = _run(fused), _run(plain)
    coarse = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(ours_N, theirs_N, rtol=coarse, atol=coarse)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == torch.float32
        assert float((mine - other).norm()) <= 3 * coarse * float(other.norm())
    assert our_bytes <= (1.0 if dtype == torch.float32 else 0.8) * their_bytes


@both
def test_the_matrix_of_a_layer_is_what_transformers_dequantizes_to(tmp_path: Path, kind: Quantization) -> None:
    weights = _weights(tmp_path, kind)
    model = load_model(weights.full, device=CPU, dtype=torch.float32)
    assert is_quantized(model)
    _logprobs(model)  # a forward moves the scales of bitsandbytes' 8-bit layers
    found = {
        name: matrix(module, torch.float32)
        for name, module in model.named_modules()
        if isinstance(module, quantized_layers())
    }
    assert len(found) == 14
    model.dequantize()
    for name, weight_OI in found.items():
        torch.testing.assert_close(weight_OI, model.get_submodule(name).weight, rtol=1e-6, atol=1e-7)


@both
def test_a_policy_starts_as_its_own_reference_in_every_mode(tmp_path: Path, kind: Quantization) -> None:
    """bitsandbytes' 8-bit layer rounds activations in eval mode and not in train mode on a CPU; ours never does."""
    weights = _weights(tmp_path, kind)
    with torch.no_grad():
        base_N = _logprobs(policy_for_reading(weights, device=CPU).model)
        model = policy_for_training(weights, LORA, device=CPU, seed=0).model
        torch.testing.assert_close(_logprobs(model), base_N, rtol=0, atol=1e-6)
        with training_mode(model, dropout="model", gradient_checkpointing="none"):
            torch.testing.assert_close(_logprobs(model), base_N, rtol=0, atol=1e-6)


@both
def test_a_tree_does_not_depend_on_its_neighbours(tmp_path: Path, kind: Quantization) -> None:
    """LLM.int8() leaves the columns unrounded in which any token of the batch is large: they would leak."""
    model = load_model(_weights(tmp_path, kind).full, device=CPU, dtype=torch.float32)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight.mul_(5)  # so that activations pass LLM.int8()'s threshold of 6
        together_N = _logprobs(model)
        alone = [Engine(model).logprobs([tree]).logprob_N for tree in TREES]
    torch.testing.assert_close(together_N, torch.cat(alone), rtol=0, atol=1e-4)


@both
def test_a_trained_policy_is_saved_read_and_merged_as_it_was(tmp_path: Path, kind: Quantization) -> None:
    weights = _weights(tmp_path, kind)
    policy = policy_for_training(weights, LORA, device=CPU, seed=0)
    trainable = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=3e-2)
    losses: list[float] = []
    for _ in range(4):
        loss = -_logprobs(policy.model).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1
    save_policy(policy, tmp_path / "adapter", stop_ids=(0,), chat_template="x")
    read = policy_for_reading(Weights(weights.full, tmp_path / "adapter"), device=CPU)
    with torch.no_grad():
        wanted_N = _logprobs(policy.model)
        torch.testing.assert_close(_logprobs(read.model), wanted_N, rtol=0, atol=2e-6)
        again = policy_for_training(Weights(weights.full, tmp_path / "adapter"), LORA, device=CPU, seed=9)
        torch.testing.assert_close(_logprobs(again.model), wanted_N, rtol=0, atol=2e-6)
        whole = merged_model(Policy(read.model, read.tokenizer, read.weights, read.adapted))
        assert not any(isinstance(module, quantized_layers()) for module in whole.modules())
        torch.testing.assert_close(_logprobs(whole), wanted_N, rtol=0, atol=2e-5)


def test_a_merged_model_keeps_the_type_of_its_base(tmp_path: Path) -> None:
    weights = Weights(_weights(tmp_path, "int8").full.model_copy(update={"dtype": "bfloat16"}))
    save_policy(
        policy_for_training(weights, LORA, device=CPU, seed=0), tmp_path / "a", stop_ids=(0,), chat_template="x"
    )
    whole = merged_model(policy_for_reading(Weights(weights.full, tmp_path / "a"), device=CPU))
    assert {parameter.dtype for parameter in whole.parameters()} == {torch.bfloat16}


@both
def test_recomputed_activations_give_the_same_gradients(tmp_path: Path, kind: Quantization) -> None:
    model = policy_for_training(_weights(tmp_path, kind), LORA, device=CPU, seed=0).model
    _fill(model)
    trained = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    found: list[tuple[Tensor, ...]] = []
    for checkpointing in ("none", "selective", "full"):
        with training_mode(model, dropout="off", gradient_checkpointing=checkpointing):  # type: ignore[arg-type]
            found.append(torch.autograd.grad(_logprobs(model).sum(), trained))
    for grads in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(grads, found[0], strict=True))


@both
def test_full_fine_tuning_is_refused(tmp_path: Path, kind: Quantization) -> None:
    with pytest.raises(ModelError, match=f"{kind} weights are frozen"):
        policy_for_training(_weights(tmp_path, kind), Full(), device=CPU, seed=0)


@both
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_the_unquantized_file_is_not_kept_in_memory(tmp_path: Path, kind: Quantization) -> None:
    weights = _weights(tmp_path, kind)
    model = load_model(weights.full, device=CPU, dtype=torch.float32)
    assert is_quantized(model)
    assert [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line] == []


@both
def test_what_the_unquantized_weights_took_is_given_back(
    tmp_path: Path, kind: Quantization, monkeypatch: pytest.MonkeyPatch
) -> None:
    # From before the first weight is read: what is freed later leaves gaps (-35 % in the memory table without it).
    calls: list[str] = []
    read = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr("tunesmith.model.load.give_back_large_blocks", lambda device: calls.append(device.type))
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *a, **k: (calls.append("read"), read(*a, **k))[1]
    )
    load_model(_weights(tmp_path, kind).full, device=CPU, dtype=torch.float32)
    assert calls == ["cpu", "read"]
