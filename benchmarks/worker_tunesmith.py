"""One measurement of Tunesmith, in a process of its own, through the parts that its training loop is made of.

In: the work folder and a method. Out: one JSON file with times, losses and memory. Must not know: TRL.

Timed are the reference pass (DPO, never cached), planning, and every step with its optimizer; not timed are
imports and the loading of the model. Settings are the product's defaults for a CPU.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import transformers

from benchmarks.workload import METHODS, Workload, answers_of, load_workload, peak_rss_gib, rss_gib
from tunesmith.data.types import Branch, Tree
from tunesmith.engine.engine import Engine
from tunesmith.engine.reference import reference_logprobs
from tunesmith.model.adapters import add_adapter, fill_adapter, inner_model
from tunesmith.model.load import load_model
from tunesmith.model.machine import Machine
from tunesmith.objectives import dpo, supervised
from tunesmith.recipe.models import Lora, Model
from tunesmith.train.modes import training_mode
from tunesmith.train.optim import gradient_norm, make_adamw, trainable_parameters, update
from tunesmith.train.step import Batch, accumulate
from tunesmith.version import VERSION


def make_trees(workload: Workload, method: str) -> list[Tree]:
    """The workload's pairs as trees; every token of an answer is trained."""
    trees = []
    for number, pair in enumerate(workload.pairs):
        branches = tuple(
            Branch(np.array(ids, np.int32), np.ones(len(ids), np.bool_)) for ids in answers_of(pair, method)
        )
        trees.append(Tree(f"pair {number}", np.array(pair.prompt, np.int32), branches))
    return trees


def load_engine(workload: Workload, folder: Path, machine: Machine) -> Engine:
    """The saved model with the saved adapter."""
    model = load_model(Model(path=str(folder / "model")), device=machine.device, dtype=torch.float32)
    lora = Lora(r=workload.shape.lora_rank, alpha=float(workload.lora_alpha))
    adapted = add_adapter(model, lora, seed=workload.seed)
    fill_adapter(adapted, folder / "adapter")
    return Engine(inner_model(adapted))


def train(engine: Engine, workload: Workload, method: str, machine: Machine, forest_tokens: int) -> list[float]:
    """All steps of the workload; the loss of each."""
    objective = dpo(workload.beta) if method == "dpo" else supervised("sft")
    trees = make_trees(workload, method)
    references = None
    if objective.needs_reference:
        references, _ = reference_logprobs(engine, trees, forest_tokens=forest_tokens, fingerprint="")
    rows = Batch(trees, references)
    trainable = trainable_parameters(engine.model)
    optimizer = make_adamw(trainable, learning_rate=workload.learning_rate, betas=(0.9, 0.999), weight_decay=0.0)
    losses = []
    with training_mode(engine.model, dropout="off", gradient_checkpointing="none"):
        for step in range(workload.num_steps):
            batch = rows.part(range(step * workload.pairs_per_step, (step + 1) * workload.pairs_per_step))
            result = accumulate(engine, batch, objective=objective, forest_tokens=forest_tokens, machine=machine)
            losses.append(result.loss.mean())
            update(
                optimizer,
                trainable,
                learning_rate=workload.learning_rate,
                norm=gradient_norm(trainable.values()),
                max_norm=workload.max_grad_norm,
            )
    return losses


def measure(folder: Path, method: str, forest_tokens: int | None = None) -> dict[str, object]:
    """Load, train under the clock, and say what came out."""
    workload = load_workload(folder / "workload.json")
    machine = Machine.detect(workload.num_threads)
    engine = load_engine(workload, folder, machine)
    forest_tokens = forest_tokens or machine.forest_tokens
    loaded_gib, start, cpu_start = rss_gib(), time.perf_counter(), time.process_time()
    losses = train(engine, workload, method, machine, forest_tokens)
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu_start,
        "losses": losses,
        "loaded_rss_gib": loaded_gib,
        "peak_rss_gib": peak_rss_gib(),
        "threads": torch.get_num_threads(),
        "versions": {"tunesmith": VERSION, "torch": torch.__version__, "transformers": transformers.__version__},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--method", choices=METHODS, required=True)
    parser.add_argument(
        "--forest-tokens", type=int, default=None, help="tokens of a micro-batch; default: the product's"
    )
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.write_text(json.dumps(measure(args.folder, args.method, args.forest_tokens)))


if __name__ == "__main__":
    main()
