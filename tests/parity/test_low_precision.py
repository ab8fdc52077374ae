"""A forward in 16 bits moves the weights as far as one in float32 (TRAPS 55)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.support.training import MACHINE, answer_trees, full_engine, lora_engine
from tunesmith.engine.engine import Engine
from tunesmith.objectives import supervised
from tunesmith.train.modes import training_mode
from tunesmith.train.optim import gradient_norm, make_optimizer, trainable_parameters, update
from tunesmith.train.step import Batch, accumulate

LEARNING_RATE = 2e-5


def moved(engine: Engine) -> dict[str, Tensor]:
    """How far 20 steps move every trained weight."""
    trainable = trainable_parameters(engine.model)
    before = {name: parameter.detach().clone() for name, parameter in trainable.items()}
    optimizer = make_optimizer(
        trainable, kind="adamw", learning_rate=LEARNING_RATE, betas=(0.9, 0.999), weight_decay=0.0
    )
    with training_mode(engine.model, dropout="off", gradient_checkpointing="none"):
        for _ in range(20):
            accumulate(engine, Batch(answer_trees(4)), objective=supervised("sft"), forest_tokens=500, machine=MACHINE)
            norm = gradient_norm(trainable.values())
            update(optimizer, trainable, learning_rate=LEARNING_RATE, norm=norm, max_norm=1.0)
    states = list(optimizer.state.values())
    assert all(state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float32 for state in states)
    return {name: parameter.detach() - before[name] for name, parameter in trainable.items()}


def length(parts: dict[str, Tensor]) -> float:
    """Euclidean length of all of them together."""
    return float(torch.cat([part.flatten() for part in parts.values()]).norm())


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_20_steps_go_as_far_as_in_float32(kind: str, dtype: torch.dtype) -> None:
    make = lora_engine if kind == "lora" else full_engine
    wanted, engine = moved(make()), make()
    if kind == "lora":  # a frozen base lies in the type that it computes in, an adapter and trained weights do not
        for parameter in engine.model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
    found = moved(replace(engine, autocast=dtype))
    assert length(found) == pytest.approx(length(wanted), rel=0.05)
    assert all(bool(part.any()) for part in found.values())
