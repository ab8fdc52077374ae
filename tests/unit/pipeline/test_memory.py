"""The plan of a stage's memory: what is chosen under a limit, what is kept, what a forecast's sum holds."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from tests.support.models import tiny_model
from tests.support.trees import random_trees
from tunesmith.engine.engine import Engine
from tunesmith.engine.trace import shapes_mode, take_shapes, trace
from tunesmith.model.shapes import Shapes, quantized_bytes, weight_bytes
from tunesmith.pipeline.memory import FILE, MemoryPlan, read_plan
from tunesmith.pipeline.memory_predict import Setting, StageShapes, Target, optimizer_bytes, predict
from tunesmith.pipeline.memory_stages import choose, memory_limit, scaled
from tunesmith.recipe.models import Full, SftStage, Source
from tunesmith.runs.atomic import write_json

TREES = random_trees([(20, (30, 12)), (9, (25,)), (14, (8, 8))], vocabulary=96)


def stage(**changes: object) -> SftStage:
    return SftStage.model_validate({"name": "s", "train": [Source(path="x.jsonl")], "tuning": Full(), **changes})


def job_of(limit: int, **changes: object) -> StageShapes:
    with torch.device("meta"):
        model = tiny_model("llama")
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    shapes = Shapes(model, weight_bytes(model))
    return StageShapes(stage(**changes), shapes, TREES, Target("cpu", torch.float32, limit, 1000))


@pytest.mark.parametrize("family", ["llama", "phi", "gemma2", "qwen3"])
def test_shapes_take_the_bytes_that_real_tensors_take(family: str) -> None:
    real = tiny_model(family)
    with torch.device("meta"):
        empty = tiny_model(family)

    def step(model: torch.nn.Module) -> int:
        def run() -> None:
            Engine(model).logprobs(TREES).logprob_N.sum().backward()  # type: ignore[arg-type]

        return trace(run, model).peak_bytes

    counted = step(real)
    with shapes_mode():
        take_shapes(empty)
        assert step(empty) == pytest.approx(counted, rel=0.02)


def test_nf4_bytes() -> None:
    # 64 x 128 = 8192 weights: 4096 bytes, 128 scales of a byte, one float32 for them, tables of 273 float32
    assert quantized_bytes(64, 128, 4) == 4096 + 128 + 4 + 4 * 273
    assert quantized_bytes(64, 128, 8) == 8192 + 4 * 64


def test_bytes_of_moments() -> None:
    assert optimizer_bytes("adamw", (4096, 100), "cpu") == 8 * 4196
    assert optimizer_bytes("adamw_8bit", (4096, 100), "cpu") == 2 * (4096 + 4 * 16) + 800
    assert optimizer_bytes("paged_adamw", (4096,), "cuda") == 0


def test_the_parts_add_up_to_the_peak() -> None:
    job = job_of(10**12, batch_size=1)
    found = predict(job, Setting(64, "none"))
    assert sum(found.parts.values()) == found.peak_bytes
    # tied embeddings 96 x 32; in each of two layers 7 matrices and 2 norms; the last norm; two buffers of 4 numbers
    layer = 32 * 32 + 2 * 16 * 32 + 32 * 32 + 3 * 32 * 48 + 2 * 32
    head = 0 if job.shapes.model.config.tie_word_embeddings else 96 * 32
    assert found.parts["weights"] == 4 * (96 * 32 + head + 2 * layer + 32 + 2 * 4)
    assert found.parts["optimizer"] == 8 * job.shapes.weights.num_trained


def test_the_first_policy_that_fits_is_chosen() -> None:
    plain = predict(job_of(0), Setting(1024, "none")).peak_bytes
    full = predict(job_of(0), Setting(1024, "full")).peak_bytes
    assert full < plain
    loose, tight = choose(job_of(plain)), choose(job_of(full, forest_tokens=1024))
    assert loose is not None and loose[0].gradient_checkpointing == "none"
    assert tight is not None and tight[0].gradient_checkpointing != "none"
    assert choose(job_of(1)) is None


def test_the_budget_lies_on_the_line_through_two_sizes() -> None:
    low, high = Setting(128, "none"), Setting(1152, "none")
    assert scaled(low, 100, high, 200, 150) == 640  # half way from 128 to 1152
    assert scaled(low, 100, high, 200, 90) == 128


def test_a_plan_is_read_again_unless_the_recipe_says_otherwise(tmp_path: Path) -> None:
    plan = MemoryPlan(512, "full", False, 7, 8, 9, ("a note",))
    write_json(tmp_path / FILE, asdict(plan))
    assert read_plan(tmp_path, stage()) == plan
    assert read_plan(tmp_path, stage(forest_tokens=256)) is None
    assert read_plan(tmp_path, stage(gradient_checkpointing="none")) is None
    (tmp_path / FILE).write_text("{")
    assert read_plan(tmp_path, stage()) is None


def test_sizes() -> None:
    assert memory_limit("16GB") == 16 * 10**9
    assert memory_limit("1.5GiB") == 1536 * 2**20
    assert memory_limit("auto") is None
