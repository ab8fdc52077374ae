"""One measurement of Tunesmith, in a process of its own, through the parts that its training loop is made of.

In: the work folder and a task. Out: one JSON file with times, losses, gradient norms and memory.
Must not know: TRL.

Timed are the reference pass where it is in the loop, planning, and every step with its optimizer; not timed are
imports, the loading of the model, and a reference that counts as cached. Settings are the product's defaults for a CPU.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import transformers

from benchmarks.workload import METHODS, Task, Workload, answers_of, load_workload, peak_rss_gib, rss_gib
from tunesmith.data.types import Branch, Tree
from tunesmith.engine.engine import Engine
from tunesmith.engine.reference import reference_logprobs
from tunesmith.engine.reference_parts import FloatArray
from tunesmith.model.adapters import add_adapter, fill_adapter, inner_model
from tunesmith.model.load import load_model
from tunesmith.model.machine import Machine
from tunesmith.objectives import dpo, supervised
from tunesmith.recipe.models import Lora, Model
from tunesmith.train.modes import training_mode
from tunesmith.train.optim import gradient_norm, make_optimizer, trainable_parameters, update
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


def load_engine(workload: Workload, folder: Path, task: Task, machine: Machine) -> Engine:
    """The saved model, with the saved adapter or with all its weights trained."""
    model = load_model(Model(path=str(folder / "model")), device=machine.device, dtype=torch.float32)
    if task.tuning == "full":
        return Engine(model.requires_grad_(True))
    lora = Lora(r=workload.shape.lora_rank, alpha=float(workload.lora_alpha))
    adapted = add_adapter(model, lora, seed=workload.seed)
    fill_adapter(adapted, folder / "adapter")
    return Engine(inner_model(adapted))


@dataclass
class Trained:
    """What the steps came to."""

    losses: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)


def references(engine: Engine, trees: list[Tree], forest_tokens: int) -> list[FloatArray]:
    """Log-probs of every answer under the policy as it is; not looked up in any cache."""
    return reference_logprobs(engine, trees, forest_tokens=forest_tokens, fingerprint="")[0]


def train(
    engine: Engine,
    rows: Batch,
    workload: Workload,
    *,
    task: Task,
    machine: Machine,
    forest_tokens: int,
) -> Trained:
    """All steps of the workload."""
    objective = dpo(workload.beta) if task.method == "dpo" else supervised("sft")
    if task.reference == "loop":
        rows = Batch(rows.trees, references(engine, list(rows.trees), forest_tokens))
    trainable = trainable_parameters(engine.model)
    optimizer = make_optimizer(
        trainable, kind="adamw", learning_rate=workload.learning_rate, betas=(0.9, 0.999), weight_decay=0.0
    )
    trained = Trained()
    with training_mode(engine.model, dropout="off", gradient_checkpointing="none"):
        for step in range(workload.num_steps):
            batch = rows.part(range(step * workload.pairs_per_step, (step + 1) * workload.pairs_per_step))
            result = accumulate(engine, batch, objective=objective, forest_tokens=forest_tokens, machine=machine)
            trained.losses.append(result.loss.mean())
            trained.gradient_norms.append(gradient_norm(trainable.values()))
            update(
                optimizer,
                trainable,
                learning_rate=workload.learning_rate,
                norm=trained.gradient_norms[-1],
                max_norm=workload.max_grad_norm,
            )
    return trained


def measure(
    folder: Path, task: Task, *, rows: str = "workload.json", forest_tokens: int | None = None
) -> dict[str, object]:
    """Load, train under the clock, and say what came out."""
    workload = load_workload(folder / rows)
    machine = Machine.detect(workload.num_threads)
    engine = load_engine(workload, folder, task, machine)
    forest_tokens = forest_tokens or machine.forest_tokens
    trees = make_trees(workload, task.method)
    cached = references(engine, trees, forest_tokens) if task.reference == "cached" else None
    loaded_gib, start, cpu_start = rss_gib(), time.perf_counter(), time.process_time()
    trained = train(engine, Batch(trees, cached), workload, task=task, machine=machine, forest_tokens=forest_tokens)
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu_start,
        "losses": trained.losses,
        "gradient_norms": trained.gradient_norms,
        "loaded_rss_gib": loaded_gib,
        "peak_rss_gib": peak_rss_gib(),
        "threads": torch.get_num_threads(),
        "versions": {"tunesmith": VERSION, "torch": torch.__version__, "transformers": transformers.__version__},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", default="workload.json", help="the rows' file in the folder")
    parser.add_argument("--method", choices=METHODS, required=True)
    parser.add_argument("--tuning", choices=("lora", "full"), default="lora")
    parser.add_argument("--reference", choices=("loop", "cached", "none"), default="none")
    parser.add_argument(
        "--forest-tokens", type=int, default=None, help="tokens of a micro-batch; default: the product's"
    )
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    task = Task(args.method, args.tuning, args.reference)
    args.out.write_text(json.dumps(measure(args.folder, task, rows=args.rows, forest_tokens=args.forest_tokens)))


if __name__ == "__main__":
    main()
