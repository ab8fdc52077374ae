"""Adapters: nothing is lost, renamed or merged into the wrong thing (TRAPS 54, 56 to 59)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from tests.support.folders import make_tokenizer
from tests.support.models import tiny_model
from tunesmith.errors import ModelError
from tunesmith.model.adapters import (
    adapter_is_identity,
    add_adapter,
    continue_adapter,
    inner_model,
    load_adapter,
    merged,
    save_adapter,
    without_adapter,
)
from tunesmith.model.added_tokens import AddedTokens
from tunesmith.model.load import load_model
from tunesmith.model.policy import Policy, Weights, save_policy
from tunesmith.recipe.models import Lora, Model

IDS = torch.tensor([[3, 9, 27, 81, 5]])
LORA = Lora(r=4, alpha=8)


def _trained(path: Path, family: str = "llama", lora: Lora = LORA) -> torch.Tensor:
    """Save an adapter that does something; returns the logits with it."""
    adapted = add_adapter(tiny_model(family), lora, seed=0)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    save_adapter(adapted, path)
    with torch.inference_mode():
        return adapted.eval()(input_ids=IDS).logits


def test_a_new_adapter_changes_nothing_and_is_float32() -> None:
    base = tiny_model("llama")
    with torch.inference_mode():
        before = base(input_ids=IDS).logits
        adapted = add_adapter(base.to(torch.bfloat16), LORA, seed=0)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 2 * 7  # A and B of seven linear layers in each of two blocks; not the LM head
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    adapted = add_adapter(tiny_model("llama"), LORA, seed=0)
    with torch.inference_mode():
        assert torch.equal(adapted(input_ids=IDS).logits, before)


def test_the_seed_draws_the_same_adapter_and_leaves_the_generator_alone() -> None:
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    base = tiny_model("llama")
    torch.manual_seed(5)
    one = add_adapter(base, LORA, seed=1).state_dict()
    assert torch.equal(torch.rand(3), wanted)
    two = add_adapter(tiny_model("llama"), LORA, seed=1).state_dict()
    other = add_adapter(tiny_model("llama"), LORA, seed=2).state_dict()
    name = next(name for name in one if "lora_A" in name)
    assert torch.equal(one[name], two[name])
    assert not torch.equal(one[name], other[name])


def test_saved_and_loaded_adapters_give_the_same_logits(tmp_path: Path) -> None:
    wanted = _trained(tmp_path)
    with torch.inference_mode():
        assert torch.equal(load_adapter(tiny_model("llama"), tmp_path)(input_ids=IDS).logits, wanted)
        continued = continue_adapter(tiny_model("llama"), LORA, tmp_path, seed=9)
        assert torch.equal(continued(input_ids=IDS).logits, wanted)
    assert any(parameter.requires_grad for parameter in continued.parameters())


def test_an_adapter_has_the_same_bytes_whatever_order_its_names_come_in(tmp_path: Path) -> None:
    # peft keeps them in sets: the order is the process's, and a stage is known by the hash of these files
    names = ["q_proj", "v_proj", "up_proj", "down_proj", "o_proj", "k_proj", "gate_proj"]
    for folder, order in (("a", names), ("b", names[::-1])):
        adapted = add_adapter(tiny_model("llama"), LORA, seed=0)
        adapted.peft_config["default"].target_modules = order  # as a set of another process would give them
        save_adapter(adapted, tmp_path / folder)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert json.loads((tmp_path / "a/adapter_config.json").read_text())["target_modules"] == sorted(names)


def test_a_renamed_tensor_is_an_error_not_a_warning(tmp_path: Path) -> None:
    _trained(tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    name = next(iter(weights))
    weights[f"{name}.old"] = weights.pop(name)
    save_file(weights, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="1 tensors are missing and 1 are left over"):
        load_adapter(tiny_model("llama"), tmp_path)


def test_another_rank_or_alpha_is_refused(tmp_path: Path) -> None:
    _trained(tmp_path)
    with pytest.raises(ModelError, match=r"\(4, \d+\), the recipe's would be \(8, \d+\)"):
        continue_adapter(tiny_model("llama"), Lora(r=8, alpha=8), tmp_path, seed=0)
    with pytest.raises(ModelError, match=r"alpha 8, the recipe says 16(.0)?"):
        continue_adapter(tiny_model("llama"), Lora(r=4, alpha=16), tmp_path, seed=0)


def test_unknown_target_modules_are_refused() -> None:
    with pytest.raises(ModelError, match="no adapter can be added"):
        add_adapter(tiny_model("llama"), Lora(target_modules=["no_such_layer"]), seed=0)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_merging_keeps_the_logits_through_a_save(tmp_path: Path, family: str) -> None:
    """gpt2 ties its head to its embeddings; a merge must not untie or drop either (TRAPS 57)."""
    wanted = _trained(tmp_path / "adapter", family)
    adapted = load_adapter(tiny_model(family), tmp_path / "adapter")
    model = merged(adapted)
    tokenizer = make_tokenizer()
    policy = Policy(model, tokenizer, Weights(Model(path="base")))
    save_policy(policy, tmp_path / "merged", stop_ids=(2,), chat_template="{{ messages }}")
    again = load_model(Model(path=str(tmp_path / "merged")), device=torch.device("cpu"), dtype=torch.float32)
    with torch.inference_mode():
        torch.testing.assert_close(again(input_ids=IDS).logits, wanted, rtol=1e-5, atol=1e-5)
    assert again.generation_config is not None
    assert again.generation_config.eos_token_id == 2


def test_dropout_in_the_config_survives_a_save(tmp_path: Path) -> None:
    model = tiny_model("gpt2", attn_pdrop=0.3)
    policy = Policy(model, make_tokenizer(), Weights(Model(path="base")))
    save_policy(policy, tmp_path, stop_ids=(2,), chat_template="x")
    again = load_model(Model(path=str(tmp_path)), device=torch.device("cpu"), dtype=torch.float32)
    assert again.config.to_dict()["attn_pdrop"] == 0.3


def test_the_engine_sees_the_adapter(tmp_path: Path) -> None:
    from tests.support.trees import random_trees
    from tunesmith.engine.engine import Engine
    from tunesmith.engine.plain import plain_logprobs

    _trained(tmp_path)
    trees = random_trees(((4, (5, 3)), (2, (4, 6))), vocabulary=96)
    model = inner_model(load_adapter(tiny_model("llama"), tmp_path))
    with torch.inference_mode():
        ours, plain = Engine(model).logprobs(trees).logprob_N, plain_logprobs(model, trees).logprob_N
        bare = plain_logprobs(tiny_model("llama"), trees).logprob_N
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(plain, bare, atol=1e-3)


def test_an_adapter_is_the_identity_until_anything_of_it_moves() -> None:
    model = inner_model(add_adapter(tiny_model("llama"), LORA, seed=0, added=AddedTokens(("<x>",), (95,))))
    assert adapter_is_identity(model)
    assert adapter_is_identity(tiny_model("llama"))  # none is none
    for name, parameter in model.named_parameters():
        if "lora_A" in name or not parameter.requires_grad:
            continue
        with torch.no_grad():
            parameter.view(-1)[-1] += 1e-6
        assert not adapter_is_identity(model), name
        with torch.no_grad():
            parameter.view(-1)[-1] -= 1e-6
            if "lora_B" in name:
                parameter.zero_()
        if "lora_B" in name:
            assert adapter_is_identity(model), name


def test_what_cannot_be_told_is_no_identity() -> None:
    for settings in ({"use_dora": True}, {"modules_to_save": ["lm_head"]}):
        config = LoraConfig(r=2, target_modules=["q_proj"], **settings)
        assert not adapter_is_identity(get_peft_model(tiny_model("llama"), config))
    adapted = add_adapter(tiny_model("llama"), LORA, seed=0)
    adapted.merge_adapter()
    assert not adapter_is_identity(adapted)


def test_without_the_adapter_the_model_is_the_base_and_all_is_restored() -> None:
    adapted = add_adapter(tiny_model("llama"), LORA, seed=0)
    model = inner_model(adapted)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    adapted.base_model.model.model.layers[0].mlp.up_proj._disable_adapters = True  # not ours to switch on
    wants = [parameter.requires_grad for parameter in model.parameters()]
    with torch.inference_mode():
        before = model(input_ids=IDS).logits
        with pytest.raises(ZeroDivisionError), without_adapter(model):
            assert torch.equal(model(input_ids=IDS).logits, tiny_model("llama")(input_ids=IDS).logits)
            assert [parameter.requires_grad for parameter in model.parameters()] == wants
            raise ZeroDivisionError
        assert torch.equal(model(input_ids=IDS).logits, before)
    assert [parameter.requires_grad for parameter in model.parameters()] == wants
