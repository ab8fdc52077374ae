"""TRAPS 44, 69."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.support.models import tiny_model
from tests.support.training import MACHINE, answer_trees, full_engine, lora_engine, pair_trees, references_of
from tunesmith.errors import ModelError
from tunesmith.objectives import dpo, supervised
from tunesmith.train.evaluate import check_reference, evaluate
from tunesmith.train.modes import Checkpointing, Dropout, eval_mode, training_mode
from tunesmith.train.step import Batch, score


def modes_of(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


def mixed(model: nn.Module) -> dict[str, bool]:
    """Put every third module in train mode, so that a blanket restore is seen."""
    for number, module in enumerate(model.modules()):
        module.training = number % 3 == 0
    return modes_of(model)


def test_modes_are_restored_one_by_one() -> None:
    model = lora_engine(dropout=0.1).model
    before = mixed(model)
    with eval_mode(model):
        assert not any(modes_of(model).values())
    assert modes_of(model) == before


@pytest.mark.parametrize("dropout", ["model", "adapter", "off"])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_modes_are_restored_after_an_error(dropout: Dropout, checkpointing: Checkpointing) -> None:
    model = lora_engine(dropout=0.1).model
    before = mixed(model)
    with (
        pytest.raises(KeyError),
        training_mode(model, dropout=dropout, gradient_checkpointing=checkpointing, offload=True),
    ):
        raise KeyError
    assert modes_of(model) == before
    assert not model.is_activation_checkpointing


def test_modes_are_restored_by_an_evaluation_that_fails() -> None:
    engine = full_engine()
    before = mixed(engine.model)
    engine.model.model.norm.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate(engine, Batch(answer_trees(1)), objective=supervised("sft"), forest_tokens=50, machine=MACHINE)
    assert modes_of(engine.model) == before


def active_dropouts(model: nn.Module) -> set[str]:
    return {
        "adapter" if "lora_dropout" in name else "model"
        for name, m in model.named_modules()
        if m.training and isinstance(m, nn.Dropout)
    }


@pytest.mark.parametrize(
    ("dropout", "expected"), [("model", {"adapter", "model"}), ("adapter", {"adapter"}), ("off", set())]
)
def test_which_dropouts_are_on(dropout: Dropout, expected: set[str]) -> None:
    model = lora_engine(dropout=0.1, family="gpt2").model
    with training_mode(model, dropout=dropout, gradient_checkpointing="none"):
        assert active_dropouts(model) == expected


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_a_preference_stage_without_dropout_is_deterministic(checkpointing: Checkpointing) -> None:
    """Config dropout 0.5 everywhere, attention's too: two passes are equal bit by bit."""
    config = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5, "n_positions": 128}
    engine = full_engine("gpt2", **config)
    batch = Batch(pair_trees(2))
    with training_mode(engine.model, dropout="off", gradient_checkpointing=checkpointing):
        first, second = (score(engine, batch, forest_tokens=100, machine=MACHINE, seed_key=key) for key in "ab")
    assert first.equal(second)
    with training_mode(engine.model, dropout="model", gradient_checkpointing=checkpointing):
        first, second = (score(engine, batch, forest_tokens=100, machine=MACHINE, seed_key=key) for key in "ab")
    assert not first.equal(second)
    assert engine.model.config.resid_pdrop == 0.5


def test_dropout_depends_on_the_key_alone_and_leaves_the_generator_as_it_was() -> None:
    engine = lora_engine(dropout=0.5, moved=True)
    batch = Batch(pair_trees(2))
    torch.manual_seed(1)
    with training_mode(engine.model, dropout="model", gradient_checkpointing="none"):
        first = score(engine, batch, forest_tokens=100, machine=MACHINE, seed_key="a")
        after_one = torch.rand(1)
        again = score(engine, batch, forest_tokens=100, machine=MACHINE, seed_key="a")
    torch.manual_seed(1)
    assert first.equal(again)
    assert after_one.equal(torch.rand(1))


def test_model_that_cannot_checkpoint_is_refused() -> None:
    model = tiny_model("llama")
    model.model.layers = nn.ModuleList()
    with (
        pytest.raises(ModelError, match="no gradient checkpointing"),
        training_mode(model, dropout="off", gradient_checkpointing="full"),
    ):
        pass


def test_reference_check_allows_for_a_coarse_forward() -> None:
    """bfloat16 differs between packings by more than 1e-5, and that is no other reference."""
    engine = full_engine()
    engine.model.to(torch.bfloat16)
    trees = pair_trees()
    batch = Batch(trees, references_of(engine, trees))
    found, expected = check_reference(engine, batch, objective=dpo(0.5), forest_tokens=60, machine=MACHINE)
    assert found == pytest.approx(expected, abs=0.05)
    assert expected == pytest.approx(0.6931472, abs=1e-7)
