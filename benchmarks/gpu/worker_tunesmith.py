"""One side of a case under Tunesmith, in a process of its own, through the product's own `train_stage`.

In: a job's JSON. Out: lines of JSON for the driver. Must not know: TRL.

Timed are whole steps with their optimizer; the reference pass (never cached) is timed apart, over all rows, and the
report adds a round's share of it. Not timed: imports, building the model, the parity check.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
from transformers import PreTrainedModel

from benchmarks.gpu.build import fill_adapter, make_model
from benchmarks.gpu.cases import Case, Side, from_json
from benchmarks.gpu.meter import Finished, Rounds, Talk, synchronize, toy_threads
from benchmarks.gpu.rows import make_rows
from benchmarks.gpu.shapes import LORA_ALPHA, LORA_RANK, SHAPES
from benchmarks.workload import Pair, answers_of
from tunesmith.data.plan import step_examples
from tunesmith.data.types import Branch, Tree
from tunesmith.engine.engine import Engine
from tunesmith.engine.parity import ParityReport, checked_engine
from tunesmith.engine.reference import reference_logprobs
from tunesmith.model.adapters import add_adapter, inner_model
from tunesmith.model.compiled import compile_layers
from tunesmith.model.kernels import apply_kernels
from tunesmith.model.machine import Machine
from tunesmith.objectives import objective_of
from tunesmith.pipeline.memory import MemoryPlan, fixed_plan, plan_stage_memory
from tunesmith.recipe.models import DpoStage, Lora, Model, SftStage, Source
from tunesmith.runs.folder import StageFolder
from tunesmith.runs.records import Value
from tunesmith.train.loop import train_stage
from tunesmith.train.precision import autocast_of
from tunesmith.version import VERSION

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SEED, LEARNING_RATE = 0, 1e-4
FALLBACK_TOKENS = 8192
"""Of a micro-batch, without checkpointing, where the plan failed."""
TOY_SCALE = 0.03
"""Of the lengths of rows in toy runs."""


@dataclass
class Watch:
    """An observer of the loop that tells the rounds; what the loop notes is kept."""

    rounds: Rounds
    notes: list[str]

    def started(self, stage: str, *, first_step: int, num_steps: int) -> None:
        """Nothing."""

    def stepped(self, record: Mapping[str, Value], timing: Mapping[str, Value]) -> None:
        loss = record["loss"]
        assert isinstance(loss, float)
        self.rounds.lost(loss)
        self.rounds.stepped()

    def evaluated(self, record: Mapping[str, Value]) -> None:
        """Nothing."""

    def noted(self, text: str) -> None:
        self.notes.append(text)

    def finished(self) -> None:
        """Nothing."""


def make_trees(pairs: list[Pair], method: str, pairs_per_step: int) -> list[Tree]:
    """The pairs as trees, placed so that the loop's shuffle takes them in their order: as TRL does."""
    num_steps = len(pairs) // pairs_per_step
    order = [i for step in range(num_steps) for i in step_examples(len(pairs), pairs_per_step, SEED, step)]
    trees: list[Tree | None] = [None] * len(pairs)
    for number, (place, pair) in enumerate(zip(order, pairs, strict=True)):
        branches = tuple(
            Branch(np.array(ids, np.int32), np.ones(len(ids), np.bool_)) for ids in answers_of(pair, method)
        )
        trees[place] = Tree(f"pair {number}", np.array(pair.prompt, np.int32), branches)
    return [tree for tree in trees if tree is not None]


def make_stage(case: Case, side: Side, num_steps: int) -> DpoStage | SftStage:
    """The stage of a recipe with the settings of a side; all else at the product's defaults."""
    stage: type[DpoStage] | type[SftStage] = DpoStage if case.method == "dpo" else SftStage
    return stage.model_validate(
        {
            "name": "bench",
            "train": [Source(path="random")],
            "batch_size": case.pairs_per_step,
            "max_steps": num_steps,
            "learning_rate": LEARNING_RATE,
            "schedule": "constant",
            "warmup_fraction": 0.0,
            "optimizer": side.optimizer,
            "gradient_checkpointing": side.checkpointing if side.forest_tokens else None,
            "forest_tokens": side.forest_tokens or None,
            "tuning": Lora(r=LORA_RANK, alpha=float(LORA_ALPHA)),
            "save_every": 0,
        }
    )


def make_policy(case: Case, *, machine: Machine, toy: bool) -> PreTrainedModel:
    """The frozen model with a fresh adapter of known values."""
    shape = SHAPES[case.model].toy() if toy else SHAPES[case.model]
    dtype = forward_dtype(case, machine.device, toy=toy)
    base = make_model(shape, device=machine.device, dtype=dtype, quantization=case.quantization, seed=SEED)
    adapted = add_adapter(base, Lora(r=LORA_RANK, alpha=float(LORA_ALPHA)), seed=SEED)
    fill_adapter(adapted, seed=SEED)
    return inner_model(adapted)


@dataclass(frozen=True)
class Ready:
    """What `pipeline.stage.run_stage` makes before it trains, made here in the same order with the same calls."""

    engine: Engine
    report: ParityReport
    plan: MemoryPlan


def forward_dtype(case: Case, device: torch.device, *, toy: bool) -> torch.dtype:
    """Type of frozen weights and the forward pass."""
    return torch.float32 if toy and device.type == "cpu" else DTYPES[case.dtype]


def prepare(
    case: Case, side: Side, model: PreTrainedModel, trees: list[Tree], *, machine: Machine, notes: list[str], toy: bool
) -> Ready:
    """Kernels, the checked engine, the plan of memory. A plan that fails is noted, and fixed settings stand in."""
    dtype = forward_dtype(case, machine.device, toy=toy)
    notes.append(apply_kernels(model, side.kernels))
    autocast = autocast_of(dtype, machine.device)
    engine, report = checked_engine(model, trees, attention=side.attention, autocast=autocast)
    notes.append(report.line())
    if side.compile:
        notes.append(compile_layers(model))
    stage = make_stage(case, side, 1)
    if side.forest_tokens:
        return Ready(engine, report, fixed_plan(stage, machine))
    with tempfile.TemporaryDirectory(prefix="tunesmith-gpu-") as name:
        folder = Path(name)
        (SHAPES[case.model].toy() if toy else SHAPES[case.model]).config().save_pretrained(folder)
        recipe = Model(path=name, quantization=case.quantization, dtype=_name_of(dtype))
        try:
            plan = plan_stage_memory(
                engine,
                stage,
                trees=trees,
                model=recipe,
                memory="auto",
                machine=machine,
                folder=folder,
                tell=notes.append,
            )
        except Exception as problem:  # the steps are what is measured; the note says what happened
            notes.append(f"NO PLAN: {type(problem).__name__}: {str(problem)[:200]}")
            plan = fixed_plan(make_stage(case, replace(side, forest_tokens=FALLBACK_TOKENS), 1), machine)
    return Ready(engine, report, plan)


def _name_of(dtype: torch.dtype) -> Literal["float32", "bfloat16", "float16"]:
    names: dict[torch.dtype, Literal["float32", "bfloat16", "float16"]] = {
        torch.float32: "float32",
        torch.bfloat16: "bfloat16",
        torch.float16: "float16",
    }
    return names[dtype]


def _reference(engine: Engine, trees: list[Tree], forest_tokens: int, device: torch.device) -> tuple[Any, float]:
    """The reference's log-probs, and the seconds that they took, after a warm-up on a few rows."""
    reference_logprobs(engine, trees[:4], forest_tokens=forest_tokens, fingerprint="")
    synchronize(device)
    start = time.perf_counter()
    references, _ = reference_logprobs(engine, trees, forest_tokens=forest_tokens, fingerprint="")
    synchronize(device)
    return references, time.perf_counter() - start


def measure(case: Case, side: Side, *, talk: Talk, toy: bool = False) -> None:
    """Build, wait, warm up, measure every round; ends by itself after the last."""
    machine = Machine.detect(toy_threads() if toy else 0)
    device = machine.device
    rounds = Rounds(talk, device, case.timed_steps, case.rounds)
    shape = SHAPES[case.model].toy() if toy else SHAPES[case.model]
    num_pairs = rounds.num_steps * case.pairs_per_step
    scale = TOY_SCALE if toy else 1.0
    pairs = make_rows(case.rows, num_pairs, seed=SEED, vocab_size=shape.vocab, scale=scale)
    trees = make_trees(pairs, case.method, case.pairs_per_step)
    model = make_policy(case, machine=machine, toy=toy)
    watch = Watch(rounds, [])
    with tempfile.TemporaryDirectory(prefix="tunesmith-gpu-") as folder:
        try:
            rounds.begin()
            ready = prepare(case, side, model, trees, machine=machine, notes=watch.notes, toy=toy)
            engine, plan = ready.engine, ready.plan
            stage = make_stage(case, side, rounds.num_steps)
            objective = objective_of(stage)
            references, seconds = None, 0.0
            if objective.needs_reference:
                references, seconds = _reference(engine, trees, plan.forest_tokens, device)
            talk.say(
                "reference",
                seconds=seconds,
                pairs=num_pairs if seconds else 0,
                parity=ready.report.line(),
                backend=engine.backend,
                plan="" if side.forest_tokens else f", {plan.forest_tokens} tokens, {plan.gradient_checkpointing}",
                notes=watch.notes,
            )
            train_stage(
                engine=engine,
                stage=stage,
                objective=objective,
                train=trees,
                references=None if references is None else (references, []),
                folder=StageFolder(Path(folder) / "bench"),
                seed=SEED,
                machine=machine,
                observer=watch,
                forest_tokens=plan.forest_tokens,
                gradient_checkpointing=plan.gradient_checkpointing,
            )
        except Finished:
            pass
    versions = {"tunesmith": VERSION, "torch": torch.__version__, "transformers": transformers.__version__}
    talk.say("done", notes=watch.notes, versions=versions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--job", required=True, help="the JSON of cases.as_json")
    parser.add_argument("--talk", type=int, required=True, help="file descriptor of the driver's pipe")
    parser.add_argument("--toy", action="store_true")
    args = parser.parse_args()
    case, side = from_json(json.loads(args.job))
    talk = Talk(os.fdopen(args.talk, "w"))
    measure(case, side, talk=talk, toy=args.toy)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
