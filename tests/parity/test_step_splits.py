"""TRAPS 1-4, 8, 11: the gradient and the logged loss of a step, against float64 references, under every split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.support.models import tiny_model
from tests.support.slow_losses import slow_dpo, slow_nll, slow_spread
from tests.support.training import (
    MACHINE,
    answer_trees,
    assert_gradients_equal,
    full_engine,
    gradients_of,
    lora_engine,
    noisy_references,
    pair_trees,
    spread_objective,
    text_trees,
)
from tunesmith.engine.engine import Engine
from tunesmith.objectives import Objective, dpo, supervised
from tunesmith.train.step import Batch, StepResult, accumulate

torch.set_num_threads(1)

PAIRS, ANSWERS, TEXTS = pair_trees(), answer_trees(), text_trees()
REFERENCES = noisy_references(PAIRS)


@dataclass(frozen=True)
class Case:
    batch: Batch
    objective: Objective
    slow: Callable[[PreTrainedModel], Tensor]


CASES = {
    "sft": Case(Batch(ANSWERS), supervised("sft"), lambda model: slow_nll(model, ANSWERS)),
    "completion": Case(Batch(TEXTS), supervised("completion"), lambda model: slow_nll(model, TEXTS)),
    "sft with replay": Case(
        Batch([*ANSWERS, *TEXTS[:3]]), supervised("sft"), lambda model: slow_nll(model, [*ANSWERS, *TEXTS[:3]])
    ),
    "dpo": Case(Batch(PAIRS, REFERENCES), dpo(0.1), lambda model: slow_dpo(model, PAIRS, REFERENCES)),
    "dpo smoothed": Case(
        Batch(PAIRS, REFERENCES), dpo(0.3, 0.1), lambda model: slow_dpo(model, PAIRS, REFERENCES, 0.3, 0.1)
    ),
    "coupled": Case(Batch(PAIRS), spread_objective(), lambda model: slow_spread(model, PAIRS)),
}


# GPT-2 is float64 throughout. Llama's norm rounds to float32 whatever the weights are, so its loss is noisy.
GPT2 = {"n_positions": 128}


@cache
def slow(name: str) -> tuple[float, dict[str, Tensor]]:
    """The float64 loss and gradients, by the plain forward."""
    model = tiny_model("llama").double()
    loss = CASES[name].slow(model)
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.item(), grads


def step(
    name: str, forest_tokens: int, objective: Objective | None = None, engine: Engine | None = None
) -> tuple[StepResult, dict[str, Tensor]]:
    engine = engine or full_engine()
    case = CASES[name]
    result = accumulate(
        engine, case.batch, objective=objective or case.objective, forest_tokens=forest_tokens, machine=MACHINE
    )
    return result, gradients_of(engine)


# 1: one tree a forest; 10,000: all in one; between: two to five forests
@pytest.mark.parametrize("forest_tokens", [1, 60, 110, 10_000])
@pytest.mark.parametrize("name", CASES)
def test_gradient_and_loss_are_those_of_the_whole_step_in_float64(name: str, forest_tokens: int) -> None:
    expected_loss, expected = slow(name)
    result, found = step(name, forest_tokens)
    assert_gradients_equal(found, expected)
    assert result.loss.mean() == pytest.approx(expected_loss, rel=2e-6)


@pytest.mark.parametrize("name", ["sft", "dpo", "dpo smoothed"])
def test_two_phase_form_equals_one_pass(name: str) -> None:
    one_pass, expected = step(name, 60)
    two_phase, found = step(name, 60, replace(CASES[name].objective, separable=False))
    assert_gradients_equal(found, expected)
    assert two_phase.loss.mean() == pytest.approx(one_pass.loss.mean(), rel=1e-9)


def test_a_mean_of_means_would_be_seen() -> None:
    """The rows are unequal enough: dividing each forest by its own count gives another gradient."""
    engine = full_engine()
    for tree in ANSWERS:
        (-engine.logprobs([tree]).logprob_N.mean() / len(ANSWERS)).backward()
    with pytest.raises(AssertionError):
        assert_gradients_equal(gradients_of(engine), slow("sft")[1])


@pytest.mark.parametrize(("family", "config"), [("gpt2", GPT2), ("mixtral", {})])
def test_other_families_do_not_depend_on_the_split(family: str, config: dict[str, int]) -> None:
    grads = []
    for forest_tokens in (1, 10_000):
        engine = full_engine(family, **config)
        accumulate(engine, Batch(PAIRS, REFERENCES), objective=dpo(0.1), forest_tokens=forest_tokens, machine=MACHINE)
        grads.append(gradients_of(engine))
    assert_gradients_equal(grads[0], grads[1])


def test_lora_gradients_do_not_depend_on_the_split() -> None:
    grads = []
    for forest_tokens in (1, 110, 10_000):
        engine = lora_engine(moved=True)
        accumulate(engine, CASES["dpo"].batch, objective=dpo(0.1), forest_tokens=forest_tokens, machine=MACHINE)
        grads.append(gradients_of(engine))
    assert set(grads[0]) == {name for name in grads[0] if "lora_" in name}
    assert_gradients_equal(grads[1], grads[0])
    assert_gradients_equal(grads[2], grads[0])


@pytest.mark.parametrize("name", CASES)
def test_finite_differences_on_five_random_weights(name: str) -> None:
    _, found = step(name, 110, engine=full_engine("gpt2", **GPT2))
    model = tiny_model("gpt2", **GPT2).double()
    parameters = dict(model.named_parameters())
    draw = np.random.default_rng(11)
    largest = max(float(tensor.abs().max()) for tensor in found.values())
    for parameter_name in draw.choice(sorted(parameters), 5, replace=False):
        flat = parameters[parameter_name].data.view(-1)
        # the weight with the largest gradient among some drawn ones: an untouched one would prove nothing
        drawn = draw.integers(0, flat.numel(), 200)
        place = int(max(drawn, key=lambda index: abs(float(found[parameter_name].view(-1)[index]))))
        before, losses = float(flat[place]), []
        for shift in (1e-4, -1e-4):
            flat[place] = before + shift
            with torch.no_grad():
                losses.append(float(CASES[name].slow(model)))
        flat[place] = before
        difference = (losses[0] - losses[1]) / 2e-4
        assert float(found[parameter_name].view(-1)[place]) == pytest.approx(difference, rel=1e-4, abs=1e-6 * largest)
