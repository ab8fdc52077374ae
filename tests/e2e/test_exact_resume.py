"""R1, R4, R6: a run that was broken off in every phase of its life ends with the bytes of one that never was.

Every method, trained in every way, is broken off again and again in one run folder: while rows are prepared, between
stages, while the reference is scored, in the middle of an epoch, in the middle of an evaluation, and behind an epoch's
end. Each time nothing is saved, as when the power fails, and the same call goes on. Model, rows and seeds are tiny;
dropout is on wherever the method has it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from tests.support.folders import make_model_folder, pairs, questions, write_rows
from tests.support.optional import needs_bitsandbytes
from tunesmith.data.render import Renderer
from tunesmith.engine.engine import Engine
from tunesmith.pipeline import run as run_module
from tunesmith.pipeline import stage as stage_module
from tunesmith.pipeline.api import generate, load
from tunesmith.pipeline.run import run_recipe
from tunesmith.pipeline.starts import start_weights
from tunesmith.recipe.load import LoadedRecipe, parse_recipe
from tunesmith.runs.records import Value
from tunesmith.train import evaluating
from tunesmith.train.progress import Silent

METHODS = ("sft", "completion", "dpo")
TUNINGS = {
    "full": ({"kind": "full"}, "none"),
    "lora": ({"kind": "lora", "r": 4, "alpha": 8, "dropout": 0.1}, "none"),
    "nf4": ({"kind": "lora", "r": 4, "alpha": 8, "dropout": 0.1}, "nf4"),
}
CELLS = [
    pytest.param(method, tuning, marks=[needs_bitsandbytes] if tuning == "nf4" else [], id=f"{method}-{tuning}")
    for method in METHODS
    for tuning in TUNINGS
] + [pytest.param("reward", "lora", id="reward-lora")]
ROWS: dict[str, list[dict[str, object]]] = {
    "sft": questions(8),
    "completion": [{"text": f"The sea is {number} times as blue, or grey."} for number in range(8)],
    "dpo": pairs(8),
    "reward": pairs(8),
}
# 8 rows, 4 a step: 2 steps an epoch. Forests of 64 tokens: a step, an evaluation and the reference take several.
CADENCE = {"batch_size": 4, "epochs": 2, "save_every": 1, "eval_every": 1, "keep_checkpoints": 2, "forest_tokens": 64}
CLOCKS = ("timings.jsonl", "memory.json")
"""Of a stage's files, those that hold seconds, rates and bytes of memory."""


class PowerCut(BaseException):
    """Nothing catches it, so nothing is saved on its way."""


class Watch(Silent):
    """Breaks off after a step of the stage under test; notes after which step each start went on."""

    def __init__(self, break_after: int = 0) -> None:
        self.break_after = break_after
        self.first_steps: dict[str, int] = {}
        self._stage = ""

    def started(self, stage: str, *, first_step: int, num_steps: int) -> None:
        self._stage = stage
        self.first_steps[stage] = first_step

    def stepped(self, record: Mapping[str, Value], timing: Mapping[str, Value]) -> None:
        if self._stage == "second" and record["step"] == self.break_after:
            raise PowerCut


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with dropout in its attention, and rows for every method."""
    folder = tmp_path_factory.mktemp("inputs")
    model = make_model_folder(folder / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.1}))
    for method, rows in ROWS.items():
        write_rows(folder / f"{method}.jsonl", rows)
        write_rows(folder / f"{method}-heldout.jsonl", [_other(row) for row in rows[:4]])
    return folder


def _other(row: Mapping[str, object]) -> dict[str, object]:
    return {name: f"{value} Then" for name, value in row.items()}


def recipe(inputs: Path, runs: Path, method: str, tuning: str) -> LoadedRecipe:
    """A stage of two steps, and behind it the one under test."""
    trained, quantization = TUNINGS[tuning]

    def stage(name: str, kind: str, **settings: object) -> dict[str, object]:
        files = {"train": [{"path": str(inputs / f"{kind}.jsonl")}]}
        return {"name": name, "method": kind, "tuning": trained, "max_length": 128, "learning_rate": 5e-3} | {
            **files,
            **CADENCE,
            **settings,
        }

    heldout = {"heldout": [{"path": str(inputs / f"{method}-heldout.jsonl")}]}
    return parse_recipe(
        {
            "name": "matrix",
            "runs_folder": str(runs),
            "threads": 1,
            "model": {"path": str(inputs / "model"), "quantization": quantization},
            "stages": [stage("first", "sft", max_steps=2, eval_every=0), stage("second", method, **heldout)],
        }
    )


def _cut_at(call: int, function: Callable[..., object]) -> Callable[..., object]:
    """`function`, with a power cut at its call number `call`, from 1."""
    calls = 0

    def wrapped(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls == call:
            raise PowerCut
        return function(*args, **kwargs)

    return wrapped


def _cut_forest(call: int) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(Engine, "logprobs", _cut_at(call, Engine.logprobs))


def _within(module: object, name: str, occasion: int, forest: int) -> Callable[[pytest.MonkeyPatch], None]:
    """A power cut at a forest within the call number `occasion` of a function of `module`."""

    def apply(patch: pytest.MonkeyPatch) -> None:
        inner: Callable[..., object] = vars(module)[name]
        calls = 0

        def wrapped(*args: object, **kwargs: object) -> object:
            nonlocal calls
            calls += 1
            if calls == occasion:
                _cut_forest(forest)(patch)
            return inner(*args, **kwargs)

        patch.setattr(module, name, wrapped)

    return apply


def _in_preparation(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Renderer, "render_many", _cut_at(2, Renderer.render_many))  # the first stage's rows are ready


def _between_stages(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(run_module, "start_weights", _cut_at(2, start_weights))


def _nowhere(patch: pytest.MonkeyPatch) -> None:
    """The observer breaks off."""


# name, how, after which step of the second stage the observer breaks off, where the start before it went on
BREAKS: list[tuple[str, Callable[[pytest.MonkeyPatch], None], int, int | None]] = [
    ("preparation", _in_preparation, 0, None),
    ("between stages", _between_stages, 0, None),
    ("reference scoring", _within(stage_module, "reference_logprobs", 1, 2), 0, None),
    ("the first evaluation", _within(evaluating, "evaluate", 1, 2), 0, 0),
    ("mid-epoch", _nowhere, 2, 0),
    ("evaluation", _within(evaluating, "evaluate", 1, 2), 0, 1),
    ("epoch end", _nowhere, 3, 1),
]
LAST_START = 2
"""The last start goes on from the end of the first epoch: what came after it was lost."""


def whole_and_broken(
    inputs: Path, folder: Path, method: str, tuning: str, patch: pytest.MonkeyPatch
) -> tuple[Path, Path]:
    """Two runs of one recipe, with caches of their own; the second was broken off at every one of BREAKS."""
    patch.setenv("XDG_CACHE_HOME", str(folder / "caches" / "whole"))
    whole = run_recipe(recipe(inputs, folder / "whole", method, tuning), observer=Watch())
    patch.setenv("XDG_CACHE_HOME", str(folder / "caches" / "broken"))
    loaded = recipe(inputs, folder / "broken", method, tuning)
    for name, apply, step, first_step in BREAKS:
        if name == "reference scoring" and method != "dpo":
            continue
        watch = Watch(step)
        with pytest.MonkeyPatch.context() as inner:
            apply(inner)
            with pytest.raises(PowerCut):
                run_recipe(loaded, observer=watch)
        assert watch.first_steps.get("second") == first_step, name
    watch = Watch()
    broken = run_recipe(loaded, observer=watch)
    assert watch.first_steps == {"second": LAST_START}
    return whole, broken


def stage_bytes(run: Path) -> dict[str, str]:
    """sha256 of every file of the stages, but those with a clock or a size of memory in them."""
    files = sorted(path for path in (run / "stages").rglob("*") if path.is_file() and path.name not in CLOCKS)
    return {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def answers(run: Path) -> list[str]:
    """What the second stage's result says, drawn at temperature 1."""
    prompts = [f"Which is number {number}?" for number in range(3)]
    return generate(load(run, "second"), prompts, max_new_tokens=6, temperature=1.0, seed=5)


@pytest.mark.parametrize(("method", "tuning"), CELLS)
def test_broken_off_everywhere_equals_unbroken_bit_by_bit(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, tuning: str
) -> None:
    whole, broken = whole_and_broken(inputs, tmp_path, method, tuning, monkeypatch)
    expected, found = stage_bytes(whole), stage_bytes(broken)
    assert [name for name in expected if found.get(name) != expected[name]] == []
    assert found.keys() == expected.keys()
    weights = "model/model" if tuning == "full" else "adapter/adapter_model"
    for name in (
        f"{weights}.safetensors",
        "checkpoints/step-4/optimizer.safetensors",
        "checkpoints/step-4/trainable.safetensors",
        "metrics.jsonl",
        "eval.jsonl",
        "result.json",
    ):
        assert f"stages/second/{name}" in found
    steps = [json.loads(line)["step"] for line in (broken / "stages/second/metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]  # one record a step
    if method != "reward":  # it answers nothing
        assert answers(broken) == answers(whole)
