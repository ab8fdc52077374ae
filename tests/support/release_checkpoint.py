"""Makes the checkpoints of a release, small enough to lie in the repository: every later release must go on from them.

    python -m tests.support.release_checkpoint [FOLDER]

Run it once for a release, after its version is set; it writes tests/fixtures/checkpoints/VERSION. Each stage there is
what a run leaves behind when it dies in step 3 of 5 (a save after step 2), and `expected.jsonl`, the records of a run
that did not die. `VERSION-first` was made by the code of that version before its checkpoints named threads, kernels and
micro-batches. The models are drawn from a seed, so no weights of a base are stored.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp

import torch
from transformers import PreTrainedModel

from tests.support.models import tiny_model
from tests.support.training import Trial, dpo_stage, sft_stage
from tunesmith.engine.engine import Engine
from tunesmith.model.adapters import add_adapter
from tunesmith.recipe.models import Lora, Replay, Source
from tunesmith.train.progress import Silent
from tunesmith.version import VERSION

FOLDER = Path(__file__).parents[1] / "fixtures" / "checkpoints"
SAVED_STEP, NUM_STEPS = 2, 5

# No dropout: its draws may differ in another release of torch, and the next release must still go on.
TUNING = Lora(r=2)
CADENCE = {"tuning": TUNING, "save_every": 2, "eval_every": 2, "max_steps": NUM_STEPS, "epochs": 3}
STAGES = {
    "sft": sft_stage(replay=Replay(sources=[Source(path="y")], examples_per_step=2), **CADENCE),
    "dpo": dpo_stage(**CADENCE),
}


class Die(Silent):
    """Breaks off after step 3."""

    def stepped(self, record: object, timing: object) -> None:
        assert isinstance(record, dict)
        if record["step"] == SAVED_STEP + 1:
            raise ConnectionAbortedError


def engine() -> Engine:
    """One layer of 16 numbers, with an adapter that has moved."""
    model = tiny_model("llama", hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    inner = add_adapter(model, TUNING, seed=0).base_model.model
    assert isinstance(inner, PreTrainedModel)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in inner.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05, generator=generator)
    return Engine(inner)


def make(target: Path) -> None:
    """Write every stage of STAGES below `target`."""
    for name, stage in STAGES.items():
        broken = Trial(Path(mkdtemp()), stage)
        try:
            broken.run(Die(), engine=engine())
        except ConnectionAbortedError:
            shutil.copytree(broken.folder, target / name, ignore=shutil.ignore_patterns("timings.jsonl"))
        whole = replace(broken, folder=Path(mkdtemp()))
        whole.run(engine=engine())
        shutil.copyfile(whole.folder / "metrics.jsonl", target / name / "expected.jsonl")


if __name__ == "__main__":
    torch.set_num_threads(1)
    make((Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER) / VERSION)
