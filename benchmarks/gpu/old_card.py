"""A 16 GB card without bfloat16, emulated on a larger one: a whole recipe's stage must run through.

In: a job's JSON. Out: one line of JSON: steps, losses, peak memory, and whether anything was ever bfloat16.
Must not know: TRL.

The allocator is held to 14.7 GiB before anything is made (a T4 has 14.75 GiB for programs), weights and compute are
float16, the attention is `sdpa`, and the steps go through the product's `train_stage` with what it does for float16.
After them one more gradient is computed under a mode that sees every operation and names those that make bfloat16.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.gpu.cases import Case, Side, from_json
from benchmarks.gpu.meter import Finished, Rounds, Talk, memory, reset_peak, synchronize, toy_threads
from benchmarks.gpu.rows import make_rows
from benchmarks.gpu.shapes import SHAPES
from benchmarks.gpu.worker_tunesmith import SEED, TOY_SCALE, Watch, make_policy, make_stage, make_trees, prepare
from tunesmith.engine.reference import reference_logprobs
from tunesmith.model.machine import Machine
from tunesmith.objectives import objective_of
from tunesmith.runs.folder import StageFolder
from tunesmith.train.loop import train_stage
from tunesmith.train.modes import training_mode

ALLOWED_GIB = 14.7
STEPS = 3


class SeenTypes(TorchDispatchMode):
    """Notes every operation that returns a bfloat16 tensor, in the backward pass too."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: set[str] = set()
        self.num_calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:  # noqa: ANN001, ANN401
        result = func(*args, **(kwargs or {}))
        self.num_calls += 1
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.dtype == torch.bfloat16:
                self.operations.add(str(func))
        return result


def hold_memory(device: torch.device) -> None:
    """No more than a T4 has, for this process."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, ALLOWED_GIB * 2**30 / total), device)


def emulate(case: Case, side: Side, *, toy: bool = False) -> dict[str, Any]:
    """Train a few steps, then look for bfloat16."""
    machine = Machine.detect(toy_threads() if toy else 0)
    hold_memory(machine.device)
    shape = SHAPES[case.model].toy() if toy else SHAPES[case.model]
    pairs = make_rows(
        case.rows, STEPS * case.pairs_per_step, seed=SEED, vocab_size=shape.vocab, scale=TOY_SCALE if toy else 1.0
    )
    trees = make_trees(pairs, case.method, case.pairs_per_step)
    model = make_policy(case, machine=machine, toy=toy)
    build_peak = memory(machine.device)["peak_gib"]
    reset_peak(machine.device)
    # More rounds than steps: the stage ends by itself.
    watch = Watch(Rounds(Talk(), machine.device, timed_steps=1, num_rounds=STEPS), [])
    ready = prepare(case, side, model, trees, machine=machine, notes=watch.notes, toy=toy)
    engine, report = ready.engine, ready.report
    stage = make_stage(case, side, STEPS)
    objective = objective_of(stage)
    references, _ = reference_logprobs(engine, trees, forest_tokens=side.forest_tokens, fingerprint="")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="tunesmith-gpu-") as folder:
        try:
            train_stage(
                engine=engine,
                stage=stage,
                objective=objective,
                train=trees,
                references=(references, []),
                folder=StageFolder(Path(folder) / "bench"),
                seed=SEED,
                machine=machine,
                observer=watch,
            )
        except Finished:
            raise AssertionError("the rounds ended before the steps") from None
    synchronize(machine.device)
    seconds, found = time.perf_counter() - start, memory(machine.device)
    seen = SeenTypes()
    with training_mode(model, dropout="off", gradient_checkpointing=side.checkpointing), seen:  # type: ignore[arg-type]
        (engine.logprobs(trees[:1]).logprob_N.sum() * 1e-3).backward()
    losses = watch.rounds.losses
    complete = len(losses) == STEPS and all(map(math.isfinite, losses))
    return {
        "name": f"{SHAPES[case.model].name} {case.quantization.upper()}, {case.dtype}, {side.name}",
        "backend": engine.backend,
        "parity": report.line(),
        "losses": losses,
        "seconds": seconds,
        "allowed_gib": ALLOWED_GIB,
        "build_peak_gib": build_peak,
        **found,
        "bfloat16_operations": sorted(seen.operations),
        "operations_seen": seen.num_calls,
        "notes": watch.notes,
        "met": complete and not seen.operations and engine.backend == "sdpa",
        "summary": f"{len(losses)} steps, losses {losses}, peak {found['peak_gib']:.2f} GiB, "
        f"bfloat16 in {len(seen.operations)} operations",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--job", required=True, help="the JSON of cases.as_json")
    parser.add_argument("--toy", action="store_true")
    args = parser.parse_args()
    case, side = from_json(json.loads(args.job))
    print(json.dumps(emulate(case, side, toy=args.toy)))


if __name__ == "__main__":
    main()
