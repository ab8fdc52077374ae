"""Every kind of adapter: it starts at its reference, is saved as plain peft, merges, and runs on through stages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import PreTrainedModel

from tests.support.folders import make_tokenizer
from tests.support.models import tiny_model
from tests.support.optional import needs_bitsandbytes
from tests.support.trees import random_trees
from tunesmith.engine.engine import Engine
from tunesmith.engine.plain import plain_logprobs
from tunesmith.engine.reference import reference_logprobs
from tunesmith.errors import ModelError
from tunesmith.model.adapter_init import lora_layers
from tunesmith.model.adapters import (
    adapter_is_identity,
    add_adapter,
    continue_adapter,
    inner_model,
    load_adapter,
    merged,
    save_adapter,
)
from tunesmith.model.added_tokens import AddedTokens
from tunesmith.model.chosen import choose_trained
from tunesmith.model.load import load_model
from tunesmith.model.policy import Weights, policy_for_reading, policy_for_training
from tunesmith.model.quantized import matrix, quantized_layers
from tunesmith.recipe.models import Full, Lora, Model
from tunesmith.train.optim import trainable_parameters

IDS = torch.tensor([[3, 9, 27, 81, 5]])
TREES = random_trees(((4, (5, 3)), (2, (4, 6))), vocabulary=96)
CPU = torch.device("cpu")
WHOLE = ["embeddings", "head"]

CASES: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "rslora": ({"rslora": True}, "llama", {}),
    "dora": ({"dora": True}, "llama", {}),
    "dora and rslora": ({"dora": True, "rslora": True}, "llama", {}),
    "pissa": ({"init": "pissa"}, "llama", {}),
    "pissa and rslora": ({"init": "pissa", "rslora": True}, "llama", {}),
    "pissa, transposed": ({"init": "pissa", "target_modules": ["c_attn", "c_proj"]}, "gpt2", {}),
    "whole": ({"modules_to_save": WHOLE}, "llama", {}),
    "whole, tied": ({"modules_to_save": ["embeddings"]}, "llama", {"tie_word_embeddings": True}),
    "whole, tied by the head": ({"modules_to_save": ["head"]}, "llama", {"tie_word_embeddings": True}),
    "whole head": ({"modules_to_save": ["head"]}, "qwen2", {}),
}
every_kind = pytest.mark.parametrize("case", CASES)


def lora_of(case: str) -> Lora:
    return Lora(**({"r": 4, "alpha": 6} | CASES[case][0]))


def base_of(case: str) -> PreTrainedModel:
    return tiny_model(CASES[case][1], **CASES[case][2])


@torch.no_grad()
def move(model: torch.nn.Module) -> None:
    """As if it had been trained."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


@torch.inference_mode()
def logits_of(model: torch.nn.Module) -> torch.Tensor:
    found: torch.Tensor = model.eval()(input_ids=IDS).logits
    return found


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)


@every_kind
def test_it_starts_at_the_base_and_everything_of_it_is_trained_in_float32(case: str) -> None:
    wanted = logits_of(base_of(case))
    adapted = add_adapter(base_of(case), lora_of(case), seed=0)
    assert_near(logits_of(adapted), wanted)
    if case != "rslora":
        assert not adapter_is_identity(inner_model(adapted))  # so that the reference is scored with it
    names = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert any("lora_A" in name for name in names)
    assert any("magnitude" in name for name in names) == ("dora" in case)
    assert any("modules_to_save" in name for name in names) == ("whole" in case)
    trainable_parameters(adapted)  # raises where one of them is not float32


@every_kind
def test_plain_peft_loads_it_and_gives_the_same_logits(case: str, tmp_path: Path) -> None:
    adapted = add_adapter(base_of(case), lora_of(case), seed=0)
    move(adapted)
    wanted = logits_of(adapted)
    save_adapter(adapted, tmp_path)
    assert not torch.allclose(wanted, logits_of(base_of(case)), atol=1e-2)
    assert_near(logits_of(PeftModel.from_pretrained(base_of(case), str(tmp_path))), wanted)
    read = load_adapter(base_of(case), tmp_path)
    assert_near(logits_of(read), wanted)
    folded = merged(read)
    assert_near(logits_of(folded), wanted)
    folded.save_pretrained(str(tmp_path / "merged"))
    again = load_model(Model(path=str(tmp_path / "merged")), device=CPU, dtype=torch.float32)
    assert_near(logits_of(again), wanted)


@every_kind
def test_it_is_trained_on_as_it_is(case: str, tmp_path: Path) -> None:
    """The next stage starts at the same logits with as many trained weights, and saves the same adapter."""
    adapted = add_adapter(base_of(case), lora_of(case), seed=0)
    move(adapted)
    save_adapter(adapted, tmp_path / "one")
    continued = continue_adapter(base_of(case), lora_of(case), tmp_path / "one", seed=9)
    assert_near(logits_of(continued), logits_of(adapted))
    trained = {name: p.shape for name, p in adapted.named_parameters() if p.requires_grad}
    assert {name: p.shape for name, p in continued.named_parameters() if p.requires_grad} == trained
    save_adapter(continued, tmp_path / "two")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@every_kind
def test_the_engine_gives_the_plain_forwards_numbers_and_gradients(case: str) -> None:
    model = inner_model(add_adapter(base_of(case), lora_of(case), seed=0)).eval()
    move(model)
    results = []
    for logprob_N in (Engine(model).logprobs(TREES).logprob_N, plain_logprobs(model, TREES).logprob_N):
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        results.append((logprob_N.detach(), torch.autograd.grad(logprob_N.sum(), trained)))
    assert_near(results[0][0], results[1][0])
    for mine, reference in zip(results[0][1], results[1][1], strict=True):
        assert float((mine - reference).norm()) <= 1e-4 * float(reference.norm()) + 1e-5


@pytest.mark.parametrize("case", ["dora", "pissa", "whole, tied"])
def test_its_reference_is_the_policy_at_the_start(case: str) -> None:
    """New or trained by an earlier stage: the margin of a preference stage is 0 at step 0 (TRAPS 40)."""
    model = inner_model(add_adapter(base_of(case), lora_of(case), seed=0)).eval()
    for _ in range(2):
        engine = Engine(model)
        found, cached = reference_logprobs(engine, TREES, forest_tokens=100, fingerprint="x")
        assert not cached
        assert_near(torch.cat([torch.from_numpy(each) for each in found]), engine.logprobs(TREES).logprob_N.detach())
        move(model)


def test_pissa_takes_the_largest_directions_out_of_the_base() -> None:
    """Meng et al. 2024, equations 2 to 4: s B A has the largest r singular values of W, the rest of W the others."""
    base = tiny_model("llama")
    weight = base.model.layers[0].mlp.up_proj.weight.detach().clone()
    sizes = torch.linalg.svdvals(weight)
    adapted = add_adapter(base, Lora(r=4, alpha=6, init="pissa"), seed=0)
    layer = inner_model(adapted).model.layers[0].mlp.up_proj
    product = 1.5 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(torch.linalg.svdvals(product)[:4], sizes[:4])
    torch.testing.assert_close(torch.linalg.svdvals(layer.base_layer.weight)[0], sizes[4])
    torch.testing.assert_close(product + layer.base_layer.weight, weight)


def test_pissa_is_saved_as_a_plain_adapter_of_twice_the_rank(tmp_path: Path) -> None:
    adapted = add_adapter(tiny_model("llama"), Lora(r=4, alpha=6, init="pissa"), seed=0)
    save_adapter(adapted, tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["init_lora_weights"]) == (8, 12, True)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    shapes = {tuple(each.shape) for name, each in saved.items() if "lora_A" in name}
    assert shapes == {(8, 32), (8, 48)}


@needs_bitsandbytes
def test_loftq_brings_the_start_nearer_to_the_unquantized_model(tmp_path: Path) -> None:
    """By exactly what rank r can: the error that is left has the singular values behind the r-th."""
    tiny_model("llama", hidden_size=64, intermediate_size=128).save_pretrained(str(tmp_path / "base"))
    make_tokenizer().save_pretrained(str(tmp_path / "base"))
    full, lora = Model(path=str(tmp_path / "base"), quantization="nf4"), Lora(r=8, alpha=12, init="loftq")
    policy = policy_for_training(Weights(full), lora, device=CPU, seed=0)
    plain = load_model(Model(path=str(tmp_path / "base")), device=CPU, dtype=torch.float32)
    assert policy.adapted is not None
    weights, seen = dict(plain.named_parameters()), 0
    four_bit, _ = quantized_layers()
    for name, layer in lora_layers(policy.adapted):
        seen += isinstance(layer.get_base_layer(), four_bit)
        weight = weights[f"{name.removeprefix('base_model.model.')}.weight"]
        lost = weight - matrix(layer.get_base_layer(), torch.float32)
        product = 1.5 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        sizes = torch.linalg.svdvals(lost)
        assert float((lost - product).detach().norm()) == pytest.approx(float(sizes[8:].norm()), rel=1e-3)
    assert seen == 14
    move(policy.adapted)
    save_adapter(policy.adapted, tmp_path / "adapter")
    wanted = logits_of(policy.adapted)
    read = policy_for_reading(Weights(full, tmp_path / "adapter"), device=CPU)
    assert_near(logits_of(read.model), wanted)
    continued = policy_for_training(Weights(full, tmp_path / "adapter"), lora, device=CPU, seed=1)
    assert_near(logits_of(continued.model), wanted)


@pytest.mark.parametrize("tied", [False, True])
def test_added_tokens_are_trained_with_the_whole_embeddings(tied: bool, tmp_path: Path) -> None:
    added = AddedTokens(("<x>",), (95,))
    lora = Lora(r=4, modules_to_save=["embeddings", "head"])

    def base() -> PreTrainedModel:
        return tiny_model("llama", tie_word_embeddings=tied)

    adapted = add_adapter(base(), lora, seed=0, added=added)
    wrapped = [name for name, each in adapted.named_parameters() if each.requires_grad and "modules_to_save" in name]
    assert len(wrapped) == (1 if tied else 2)
    move(adapted)
    save_adapter(adapted, tmp_path)
    continued = continue_adapter(base(), lora, tmp_path, seed=1, added=added)
    assert_near(logits_of(continued), logits_of(adapted))


def test_one_whole_layer_alone_does_not_hold_an_added_token() -> None:
    lora = Lora(modules_to_save=["head"])
    with pytest.raises(ModelError, match="need rows in the embeddings and in the head"):
        add_adapter(tiny_model("llama"), lora, seed=0, added=AddedTokens(("<x>",), (95,)))


def test_a_whole_layer_in_bfloat16_computes_as_before_and_is_trained_in_float32() -> None:
    base = tiny_model("llama").to(torch.bfloat16)
    wanted = logits_of(base)
    adapted = add_adapter(base, Lora(r=4, modules_to_save=["embeddings", "head"]), seed=0)
    assert {each.dtype for each in adapted.parameters() if each.requires_grad} == {torch.float32}
    found = logits_of(adapted)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("made", "asked", "text"),
    [
        ({}, {"rslora": True}, "rslora False, the recipe says True"),
        ({"dora": True}, {}, "dora True, the recipe says False"),
        ({"modules_to_save": ["head"]}, {}, "modules_to_save True, the recipe says False"),
        ({"init": "pissa"}, {}, r"alpha 64, the recipe says 32(.0)?"),
    ],
)
def test_an_adapter_of_another_kind_is_not_continued(
    made: dict[str, Any], asked: dict[str, Any], text: str, tmp_path: Path
) -> None:
    save_adapter(add_adapter(tiny_model("llama"), Lora(r=4, **made), seed=0), tmp_path)
    with pytest.raises(ModelError, match=text):
        continue_adapter(tiny_model("llama"), Lora(r=4, **asked), tmp_path, seed=0)


def test_a_foreign_adapter_that_changes_the_base_is_not_continued(tmp_path: Path) -> None:
    save_adapter(add_adapter(tiny_model("llama"), Lora(r=4), seed=0), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"init_lora_weights": "pissa_niter_4"}))
    with pytest.raises(ModelError, match=r"changes the base's weights when it is loaded \(pissa_niter_4\)"):
        continue_adapter(tiny_model("llama"), Lora(r=4), tmp_path, seed=0)


def test_a_rank_above_the_shorter_side_has_no_pissa() -> None:
    with pytest.raises(ModelError, match="singular directions, and r is 40"):
        add_adapter(tiny_model("llama"), Lora(r=40, init="pissa"), seed=0)


def trained_names(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_names_choose_what_is_trained() -> None:
    model = inner_model(
        add_adapter(tiny_model("llama"), Lora(train_only=["model.layers.1"], freeze=["*.mlp.*", "*lora_A*"]), seed=0)
    )
    start = "model.layers.1.self_attn"
    assert trained_names(model) == {f"{start}.{part}_proj.lora_B.default.weight" for part in "qkvo"}


def test_a_tied_weight_is_found_by_either_name() -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    choose_trained(model, freeze=["lm_head"])
    assert "model.embed_tokens.weight" not in trained_names(model)


def test_patterns_that_match_nothing_and_freezing_everything_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="'embed' matches no weight that would be trained"):
        choose_trained(tiny_model("llama"), freeze=["embed"])
    with pytest.raises(ModelError, match=r"'lm_head' matches no weight"):  # an adapter does not train it
        add_adapter(tiny_model("llama"), Lora(freeze=["lm_head"]), seed=0)
    with pytest.raises(ModelError, match="leave no weight to train"):
        choose_trained(tiny_model("llama"), freeze=["*"])


def test_full_fine_tuning_of_a_part(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(str(tmp_path))
    make_tokenizer().save_pretrained(str(tmp_path))
    tuning = Full(train_only=["model.layers.0.mlp"])
    policy = policy_for_training(Weights(Model(path=str(tmp_path))), tuning, device=CPU, seed=0)
    assert trained_names(policy.model) == {f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
