"""Two processes on the CPU that compute one step, or one stage, together. Module-level, so that spawn can import it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.memory import FullMemory
from tests.support.training import (
    Trial,
    full_engine,
    gradients_of,
    noisy_references,
    pair_trees,
    sft_stage,
    spread_objective,
)
from tests.support.trees import random_tree
from tunesmith.model.machine import Machine
from tunesmith.objectives import Objective, dpo, supervised
from tunesmith.recipe.models import Lora
from tunesmith.train.evaluate import evaluate
from tunesmith.train.step import Batch, accumulate

Figures = dict[str, float]


def cases() -> dict[str, tuple[Batch, Objective]]:
    """By name: what the ranks compute together."""
    pairs = pair_trees(5)
    # 100 tokens in the forward of the first row and 5 trained ones; 1 and 100 in the second: a rank each
    unequal = [
        random_tree(96, (5,), vocabulary=96, seed=1),
        random_tree(1, (100,), vocabulary=96, seed=2),
    ]
    return {
        "5 and 100 trained tokens": (Batch(unequal), supervised("sft")),
        "a rank without rows": (Batch(unequal[:1]), supervised("sft")),
        "dpo": (Batch(pairs, noisy_references(pairs)), dpo(0.1, 0.1)),
        "dpo, a rank without rows": (Batch(pairs[:1], noisy_references(pairs[:1])), dpo(0.1)),
        "coupled": (Batch(pairs), spread_objective()),
    }


def compute(machine: Machine, folder: Path) -> None:
    """Every case's gradients and figures on this machine; the main rank writes them."""
    for name, (batch, objective) in cases().items():
        engine = full_engine()
        result = accumulate(engine, batch, objective=objective, forest_tokens=120, machine=machine)
        held = evaluate(engine, batch, objective=objective, forest_tokens=120, machine=machine)
        if machine.is_main:
            save_file(gradients_of(engine), folder / f"{name}.safetensors")
            means = {key: value.mean() for key, value in result.metrics.items()}
            figures = {"loss": result.loss.mean(), **means, **{f"held {key}": value for key, value in held.items()}}
            (folder / f"{name}.json").write_text(json.dumps(figures))
    stage = sft_stage(tuning=Lora(r=4), epochs=2, eval_every=2, save_every=2)
    Trial(folder / "stage", stage, dropout=0.0).run(machine=machine)


def rank_main(rank: int, world_size: int, folder: Path) -> None:
    """One rank: joins the others through a file, computes, leaves."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=world_size)
    compute(Machine(torch.device("cpu"), rank, world_size), folder)
    dist.destroy_process_group()


def memory_rank_main(rank: int, world_size: int, folder: Path) -> None:
    """One rank of two stages: in one of them rank 1 runs out of memory in its second step."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=world_size)
    machine = Machine(torch.device("cpu"), rank, world_size)
    for name in ("whole", "failing"):
        trial = Trial(folder / name, sft_stage(epochs=2), dropout=0.0)
        engine = trial.engine()
        if name == "failing" and rank == 1:
            FullMemory("backward", at=2).watch(engine.model)
        trial.run(engine=engine, machine=machine)
    dist.destroy_process_group()


def read(folder: Path, name: str) -> tuple[Figures, dict[str, Tensor]]:
    """What the main rank wrote for a case."""
    return json.loads((folder / f"{name}.json").read_text()), load_file(folder / f"{name}.safetensors")
