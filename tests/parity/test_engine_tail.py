"""The last layer runs on the tokens that a loss reads, and nothing that is read moves by it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.support.models import FAMILIES, tiny_model
from tests.support.trees import random_trees
from tunesmith.engine.engine import Engine
from tunesmith.train.modes import training_mode

TREES = random_trees(((15, (7, 4)), (13, (6,)), (8, (9, 3, 1)), (20, (5, 5))), vocabulary=96)


def gradients(model: PreTrainedModel, *, skip: bool) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    logprob_N = Engine(model, skip=skip).logprobs(TREES).logprob_N
    (logprob_N * torch.linspace(-1, 2, len(logprob_N))).sum().backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    return logprob_N.detach(), {name: grad.clone() for name, grad in grads.items() if grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_and_gradients_are_those_of_the_whole_layer(family: str) -> None:
    model = tiny_model(family).eval()
    whole_N, wanted = gradients(model, skip=False)
    few_N, found = gradients(model, skip=True)
    torch.testing.assert_close(few_N, whole_N, rtol=1e-6, atol=2e-6)
    assert found.keys() == wanted.keys()
    for name, grad in found.items():
        scale = float(wanted[name].abs().max()) + 1e-3
        assert float((grad - wanted[name]).abs().max()) / scale < 1e-5, name


def rows_of(model: PreTrainedModel, *, skip: bool) -> dict[str, int]:
    """Tokens that each layer's feed-forward and projections really compute."""
    seen: dict[str, int] = {}
    handles = []
    for number, layer in enumerate(model.model.layers):
        for name, part in {"mlp": layer.mlp.up_proj, "q": layer.self_attn.q_proj, "k": layer.self_attn.k_proj}.items():

            def note(
                module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor, key: str = f"{number}.{name}"
            ) -> None:
                seen[key] = args[0].shape[1]

            handles.append(part.register_forward_hook(note, prepend=True))
    try:
        Engine(model, skip=skip).logprobs(TREES)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def test_only_the_last_layer_leaves_tokens_out_and_never_keys() -> None:
    model = tiny_model("llama").eval()
    num_tokens = sum(tree.num_tokens for tree in TREES)
    last = len(model.model.layers) - 1
    whole = rows_of(model, skip=False)
    assert set(whole.values()) == {num_tokens}
    few = rows_of(model, skip=True)
    read = sum(len(branch.ids) - 1 for tree in TREES for branch in tree.branches) + len(TREES)
    assert few.pop(f"{last}.mlp") == few.pop(f"{last}.q") == read  # every answer but its last token; the prompt's last
    assert set(few.values()) == {num_tokens}


def test_recomputed_activations_go_the_same_way() -> None:
    model = tiny_model("llama")
    with training_mode(model, dropout="off", gradient_checkpointing="full"):
        found_N, found = gradients(model, skip=True)
    with training_mode(model, dropout="off", gradient_checkpointing="none"):
        wanted_N, wanted = gradients(model, skip=True)
    assert found_N.equal(wanted_N)
    assert all(grad.equal(wanted[name]) for name, grad in found.items())


def test_an_ordinary_forward_afterwards_is_whole() -> None:
    model = tiny_model("llama").eval()
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        before = model(input_ids=ids).logits
        Engine(model).logprobs(TREES)
        model.set_attn_implementation("sdpa")
        torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=1e-6, atol=1e-6)
