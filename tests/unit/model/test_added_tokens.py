"""Tokens that a template adds: a row each, trained alone, right in the engine, whole on disk (TRAPS 57, 60)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.trainable_tokens import TrainableTokensLayer
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel

from tests.support.chatml import bare_folder, bare_tokenizer
from tests.support.folders import make_tokenizer
from tests.support.models import tiny_model
from tests.support.trees import random_trees
from tunesmith.data.types import Tree
from tunesmith.engine import logprobs
from tunesmith.engine.engine import Engine
from tunesmith.engine.head import Head
from tunesmith.engine.plain import plain_logprobs
from tunesmith.errors import ModelError
from tunesmith.model.adapters import add_adapter, continue_adapter, inner_model, load_adapter, merged, save_adapter
from tunesmith.model.added_tokens import AddedTokens, add_tokens, make_room
from tunesmith.model.load import load_model
from tunesmith.model.policy import Policy, Weights, policy_for_reading, policy_for_training, save_policy
from tunesmith.recipe.models import Full, Lora, Model
from tunesmith.train.optim import make_optimizer, trainable_parameters

CHATML = ("<|im_start|>", "<|im_end|>")
V = 96  # rows of the tiny models
ADDED = AddedTokens(CHATML, (V, V + 1))
IDS = torch.tensor([[3, V, 27, V + 1, 5]])
LORA = Lora(r=4, alpha=8)
CPU = torch.device("cpu")


def _grown(family: str = "llama", *, tied: bool, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model = tiny_model(family, tie_word_embeddings=tied).to(dtype)
    make_room(model, V + 2, ADDED)
    return model


def _adapted(family: str = "llama", *, tied: bool, moved: bool = True) -> PeftModel:
    """An adapter with the added rows; `moved`: as training could have left it."""
    adapted = add_adapter(_grown(family, tied=tied), LORA, seed=0, added=ADDED)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if moved and ("lora_B" in name or "trainable_tokens_delta" in name):
                parameter.normal_(0, 0.3)
    return adapted


def _logits(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model.eval()(input_ids=IDS).logits
    return logits


def _trees() -> list[Tree]:
    """Trees in which both tokens are prompts, targets and contexts."""
    trees = random_trees(((4, (5, 3)), (2, (4, 6)), (3, (5,))), vocabulary=V)
    for tree in trees:
        tree.prompt_ids[0], tree.prompt_ids[1] = V, V + 1
        for branch in tree.branches:
            branch.ids[1], branch.ids[-1] = V, V + 1
    return trees


def test_tokens_are_added_only_where_asked_for_and_lacking() -> None:
    tokenizer = bare_tokenizer()
    before = len(tokenizer)
    assert add_tokens(tokenizer, None) == AddedTokens() == add_tokens(tokenizer, "plain")
    assert len(tokenizer) == before
    added = add_tokens(tokenizer, "chatml")
    assert added == AddedTokens(CHATML, (before, before + 1))
    assert added.note == "added tokens <|im_start|>, <|im_end|>: their embeddings are trained"
    assert tokenizer("a<|im_end|>")["input_ids"][-1] == before + 1
    assert tokenizer.eos_token == "<|endoftext|>"
    assert add_tokens(tokenizer, "chatml") == AddedTokens()
    assert add_tokens(make_tokenizer(), "chatml") == AddedTokens()


def test_one_token_alone_can_be_lacking() -> None:
    tokenizer = bare_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    assert add_tokens(tokenizer, "chatml") == AddedTokens(("<|im_start|>",), (len(tokenizer) - 1,))
    assert set(CHATML) <= set(tokenizer.all_special_tokens)


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_start_at_the_mean_and_no_other_row_moves(tied: bool) -> None:
    before, model = tiny_model("llama", tie_word_embeddings=tied), tiny_model("llama", tie_word_embeddings=tied)
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    make_room(model, V + 2, ADDED)
    assert torch.equal(torch.rand(3), wanted)  # no draw was taken
    pairs = (
        (model.get_input_embeddings(), before.get_input_embeddings()),
        (model.get_output_embeddings(), before.get_output_embeddings()),
    )
    for new, old in pairs:
        assert new.weight.shape == (V + 2, 32)
        assert torch.equal(new.weight[:V], old.weight)
        torch.testing.assert_close(new.weight[V:], old.weight.mean(0).expand(2, -1))
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    assert model.config.vocab_size == V + 2
    logits = _logits(model)
    torch.testing.assert_close(logits[..., V], logits[..., :V].mean(-1))


def test_spare_rows_are_used_before_the_model_grows(tmp_path: Path) -> None:
    folder = bare_folder(tmp_path, tied=True, spare_rows=10)
    num_rows = len(bare_tokenizer()) + 10
    policy = policy_for_reading(Weights(Model(path=str(folder), chat_template="chatml")), device=CPU)
    weight = policy.model.get_input_embeddings().weight
    assert policy.model.config.vocab_size == num_rows == len(weight)
    bare = load_model(Model(path=str(folder)), device=CPU, dtype=torch.float32).get_input_embeddings().weight
    changed = (weight != bare).any(-1).nonzero().flatten().tolist()
    assert changed == list(policy.added.ids) == [num_rows - 10, num_rows - 9]
    torch.testing.assert_close(weight[changed[0]], bare[: num_rows - 10].mean(0))  # the spare rows are no part of it


@pytest.mark.parametrize("tied", [True, False])
def test_the_added_rows_train_and_the_rest_of_the_embeddings_is_frozen(tied: bool) -> None:
    model = inner_model(_adapted(tied=tied, moved=False))
    trainable = trainable_parameters(model)
    rows = {name: parameter for name, parameter in trainable.items() if "lora" not in name}
    assert [tuple(parameter.shape) for parameter in rows.values()] == [(2, 32)] * (1 if tied else 2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = make_optimizer(trainable, kind="adamw", learning_rate=1e-2, betas=(0.9, 0.999), weight_decay=0.0)
    (-Engine(model).logprobs(_trees()).logprob_N.sum()).backward()
    optimizer.step()
    for name, tensor in model.state_dict().items():
        moves = "lora_B" in name or "trainable_tokens_delta" in name
        frozen = "base_layer" in name or "original" in name or "norm" in name
        if moves or frozen:
            assert torch.equal(tensor, before[name]) == frozen, name
    for parameter in rows.values():
        assert parameter.grad is not None
        assert (parameter.grad.norm(dim=-1) > 0).all()


@pytest.mark.parametrize(
    ("family", "tied"),
    [
        ("llama", True),
        ("llama", False),
        ("gemma2", True),
        ("gemma3_text", True),
        ("granite", False),
        ("cohere2", True),
        ("gpt2", True),
    ],
)
def test_the_engine_gives_the_plain_forwards_values_and_gradients(family: str, tied: bool) -> None:
    """gemma2 caps its logits, gemma3 scales its embeddings in the layer, granite and cohere2 scale their logits."""
    model = inner_model(_adapted(family, tied=tied))
    trained = list(trainable_parameters(model).values())
    got_N = Engine(model, chunk_bytes=3 * (V + 2) * 4).logprobs(_trees()).logprob_N
    want_N = plain_logprobs(model, _trees()).logprob_N
    torch.testing.assert_close(got_N, want_N, rtol=1e-5, atol=1e-5)
    weights_N = torch.linspace(-1, 2, len(want_N))
    got = torch.autograd.grad((got_N * weights_N).sum(), trained)
    want = torch.autograd.grad((want_N * weights_N).sum(), trained)
    for mine, plain in zip(got, want, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-5 * float(plain.abs().max()))


def test_no_logit_is_made_twice_for_the_sake_of_two_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = inner_model(_adapted(tied=False))
    seen: list[int] = []
    real = logprobs._tile

    def spy(head: Head, hidden_CH: torch.Tensor, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(len(hidden_CH) * (stop - start))
        return real(head, hidden_CH, start, stop)

    monkeypatch.setattr(logprobs, "_tile", spy)
    logprob_N = Engine(model).logprobs(_trees()).logprob_N
    logprob_N.sum().backward()
    assert sum(seen) == len(logprob_N) * Head.of(model).vocabulary


def test_the_engine_copies_no_embedding_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: TrainableTokensLayer, *args: object) -> None:
        raise AssertionError("peft's forward was asked, which copies the matrix")

    model = inner_model(_adapted(tied=True))
    monkeypatch.setattr(TrainableTokensLayer, "get_merged_weights", refused)
    Engine(model).logprobs(_trees()).logprob_N.sum().backward()


def test_rows_of_a_bfloat16_model_are_trained_in_float32() -> None:
    adapted = add_adapter(_grown(tied=False, dtype=torch.bfloat16), LORA, seed=0, added=ADDED)
    assert {parameter.dtype for parameter in trainable_parameters(adapted).values()} == {torch.float32}
    got_N = Engine(inner_model(adapted)).logprobs(_trees()).logprob_N
    torch.testing.assert_close(got_N, plain_logprobs(inner_model(adapted), _trees()).logprob_N, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("tied", [True, False])
def test_an_adapters_file_holds_the_rows_alone_and_gives_the_logits_back(tmp_path: Path, tied: bool) -> None:
    base = tmp_path / "base"  # a base on disk with fewer rows is what makes peft write the whole matrices
    tiny_model("llama", tie_word_embeddings=tied).save_pretrained(base)
    adapted = _adapted(tied=tied)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    save_adapter(adapted, tmp_path / "adapter")
    written = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert not [name for name, tensor in written.items() if V + 2 in tensor.shape]
    rows = {name: tensor for name, tensor in written.items() if "lora" not in name}
    assert sum(tensor.numel() * 4 for tensor in rows.values()) == 2 * 32 * 4 * (1 if tied else 2)
    wanted = _logits(adapted)
    loaded = load_adapter(_grown(tied=tied), tmp_path / "adapter")
    assert torch.equal(_logits(loaded), wanted)
    assert Head.of(inner_model(loaded)).rows is None  # folded in: no matrix is copied for every generated token
    continued = continue_adapter(_grown(tied=tied), LORA, tmp_path / "adapter", seed=9, added=ADDED)
    assert torch.equal(_logits(continued), wanted)
    resized = tiny_model("llama", tie_word_embeddings=tied)
    resized.resize_token_embeddings(V + 2)  # draws its own rows: the adapter's take their place
    torch.testing.assert_close(_logits(PeftModel.from_pretrained(resized, str(tmp_path / "adapter"))), wanted)


def test_an_adapter_goes_on_only_with_the_tokens_that_it_was_trained_with(tmp_path: Path) -> None:
    save_adapter(_adapted(tied=True), tmp_path / "with")
    with pytest.raises(ModelError, match="embeddings of the tokens 96, 97, the recipe adds none"):
        continue_adapter(tiny_model("llama", tie_word_embeddings=True), LORA, tmp_path / "with", seed=0)
    save_adapter(add_adapter(tiny_model("llama"), LORA, seed=0), tmp_path / "without")
    with pytest.raises(ModelError, match="embeddings of the tokens none, the recipe adds 96, 97"):
        continue_adapter(_grown(tied=True), LORA, tmp_path / "without", seed=0, added=ADDED)


def test_what_peft_would_get_wrong_is_refused() -> None:
    with pytest.raises(ModelError, match="head has a bias"):
        add_adapter(_grown("phi", tied=False), LORA, seed=0, added=ADDED)
    with pytest.raises(ModelError, match="lm_head is in tuning"):
        add_adapter(_grown(tied=False), Lora(target_modules=["q_proj", "lm_head"]), seed=0, added=ADDED)


@pytest.mark.parametrize("tied", [True, False])
def test_a_merged_model_keeps_rows_tie_and_stop_ids(tmp_path: Path, tied: bool) -> None:
    adapted = _adapted(tied=tied)
    wanted = _logits(adapted)
    save_adapter(adapted, tmp_path / "adapter")
    model = merged(load_adapter(_grown(tied=tied), tmp_path / "adapter"))
    tokenizer = bare_tokenizer()
    add_tokens(tokenizer, "chatml")
    policy = Policy(model, tokenizer, Weights(Model(path="base")))
    save_policy(policy, tmp_path / "merged", stop_ids=(0, V + 1), chat_template="x")
    again = load_model(Model(path=str(tmp_path / "merged")), device=CPU, dtype=torch.float32)
    torch.testing.assert_close(_logits(again), wanted, rtol=1e-5, atol=1e-5)
    assert ("lm_head.weight" in load_file(tmp_path / "merged/model.safetensors")) != tied
    assert again.config.tie_word_embeddings == tied
    assert again.config.vocab_size == V + 2
    assert again.generation_config is not None
    assert again.generation_config.eos_token_id == [0, V + 1]
    assert set(CHATML) <= set(AutoTokenizer.from_pretrained(tmp_path / "merged").all_special_tokens)


@pytest.mark.parametrize("tied", [True, False])
def test_full_fine_tuning_trains_every_row(tmp_path: Path, tied: bool) -> None:
    folder = bare_folder(tmp_path / "base", tied=tied)
    weights = Weights(Model(path=str(folder), chat_template="chatml"))
    policy = policy_for_training(weights, Full(), device=CPU, seed=0)
    assert all(parameter.requires_grad for parameter in policy.model.parameters())
    with torch.no_grad():
        policy.model.get_output_embeddings().weight[list(policy.added.ids)] += 1.0
    save_policy(policy, tmp_path / "full", stop_ids=policy.added.ids, chat_template="x")
    read = policy_for_reading(Weights(Model(path=str(tmp_path / "full"), chat_template="chatml")), device=CPU)
    assert read.added == AddedTokens()  # the saved tokenizer holds them, and the rows are not started again
    for name, tensor in policy.model.state_dict().items():
        assert torch.equal(read.model.state_dict()[name], tensor), name
