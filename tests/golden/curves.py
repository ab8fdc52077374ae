"""Golden 50-step curves: one stage of each method on a tiny seeded model, on one thread.

A change of a curve is a change of what training does. Where it is meant, write the curves anew and say why in the
commit:

    PYTHONPATH=src:. python -m tests.golden.curves [NAME...]
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch

from tests.support.methods import all_cases
from tests.support.training import Trial, completion_stage, dpo_stage, sft_stage
from tunesmith.recipe.models import Lora, Replay, Source
from tunesmith.runs.records import read_records

FOLDER = Path(__file__).parent
NUM_STEPS = 50
SHARED = {"epochs": 17, "max_steps": NUM_STEPS, "eval_every": 25, "warmup_fraction": 0.1, "weight_decay": 0.01}
REPLAY = Replay(sources=[Source(path="y")], examples_per_step=2)
# 11 rows, 4 a step: every epoch ends with a short step. Dropout off: other kernels draw otherwise.
STAGES = {
    "sft": sft_stage(**SHARED, learning_rate=2e-3, tuning=Lora(r=4), replay=REPLAY),
    "completion": completion_stage(**SHARED, learning_rate=2e-3, tuning=Lora(r=4)),
    "dpo": dpo_stage(**SHARED, learning_rate=5e-4, tuning=Lora(r=4), beta=0.1, label_smoothing=0.05),
}
# Every other method under the settings of its case (tests/parity/losses), learning rate and beta included.
WHOLE = {"forest_tokens": 2000}  # a forest a step, which is faster; that splits change nothing is proved elsewhere
STAGES |= {name: case.stage.model_copy(update=SHARED | WHOLE) for name, case in all_cases().items() if case.golden}

Curves = dict[str, list[object]]


def curves_of(name: str) -> Curves:
    """Every figure of metrics.jsonl by step, and the held-out losses."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        Trial(Path(folder), STAGES[name], dropout=0.0).run()
        records = read_records(Path(folder) / "metrics.jsonl")
        held = read_records(Path(folder) / "eval.jsonl")
    curves: Curves = {key: [record[key] for record in records] for key in records[0]}
    return {**curves, "heldout_loss": [record["loss"] for record in held]}


def path_of(name: str) -> Path:
    """The committed curves of a method."""
    return FOLDER / f"{name.replace(', ', '-').replace(' ', '_')}.json"


if __name__ == "__main__":
    for name in sys.argv[1:] or STAGES:
        lines = [f"  {json.dumps(key)}: {json.dumps(values)}" for key, values in curves_of(name).items()]
        path_of(name).write_text("{\n" + ",\n".join(lines) + "\n}\n")
        print(f"wrote {path_of(name)}")
