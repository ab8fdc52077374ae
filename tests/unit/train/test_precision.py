from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.support.training import Trial, dpo_stage, lora_engine, pair_trees, sft_stage, weights_of
from tunesmith.engine.engine import Engine
from tunesmith.errors import NumericsError, RecipeError, ResumeError
from tunesmith.recipe.models import Full
from tunesmith.runs.records import Value, read_records
from tunesmith.train.checkpoint import OPTIMIZER, STATE, WEIGHTS, load_checkpoint
from tunesmith.train.precision import MAX_SKIPS, autocast_of, make_scaler, refuse_endless_skips
from tunesmith.train.progress import Silent
from tunesmith.train.schedule import lr_multiplier

CPU = torch.device("cpu")


def engine_of(trial: Trial, dtype: torch.dtype | None) -> Engine:
    return replace(trial.engine(), autocast=dtype)


@dataclass
class Watcher(Silent):
    """Keeps what is said, and breaks off after a step."""

    crash: int = 0
    texts: list[str] = field(default_factory=list)

    def noted(self, text: str) -> None:
        self.texts.append(text)

    def stepped(self, record: Mapping[str, Value], timing: Mapping[str, Value]) -> None:
        if record["step"] == self.crash:
            raise ConnectionAbortedError


def overflow(engine: Engine, *steps: int) -> None:
    """The gradient of one weight is infinite in these backward passes, counted from 1."""
    seen = [0]

    def spoil(gradient: Tensor) -> Tensor:
        seen[0] += 1
        return gradient * (math.inf if seen[0] in steps or not steps else 1.0)

    next(parameter for parameter in engine.model.parameters() if parameter.requires_grad).register_hook(spoil)


# one forest a step, so that a backward pass is a step
STAGE = sft_stage(epochs=2, forest_tokens=10_000, save_every=1, keep_checkpoints=9, learning_rate=1e-3)


def test_what_the_forward_computes_in() -> None:
    assert autocast_of(torch.float32, CPU) is None
    assert autocast_of(torch.float16, CPU) is torch.float16
    assert autocast_of(torch.bfloat16, CPU) is torch.bfloat16


def test_bfloat16_is_never_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRAPS 68: a card without bfloat16, as T4 and V100."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    card = torch.device("cuda", 0)
    assert autocast_of(torch.float16, card) is torch.float16
    with pytest.raises(RecipeError, match=r"model\.dtype: Tesla T4 does not compute in bfloat16"):
        autocast_of(torch.bfloat16, card)


def test_only_float16_is_scaled() -> None:
    assert make_scaler(torch.float16, CPU).get_scale() == 65536
    for dtype in (torch.float32, torch.bfloat16):
        assert not make_scaler(dtype, CPU).is_enabled()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_a_stage_in_low_precision_follows_float32(tmp_path: Path, name: str, tuning: str, dtype: torch.dtype) -> None:
    """Weights and moments stay float32; losses and norms are those of float32 to the type's rounding."""
    make = {"sft": sft_stage, "dpo": dpo_stage}[name]
    stage = make(learning_rate=1e-3, epochs=1, **({"tuning": Full()} if tuning == "full" else {}))
    found = []
    for kind in (None, dtype):
        trial = Trial(tmp_path / str(kind), stage, dropout=0.0)
        _, engine = trial.run(engine=engine_of(trial, kind))
        found.append(read_records(trial.folder / "metrics.jsonl"))
    assert {weight.dtype for weight in weights_of(engine).values()} == {torch.float32}
    moments = load_checkpoint(trial.folder / "checkpoints" / "step-3").optimizer
    assert {tensor.dtype for tensor in moments.values()} == {torch.float32}
    assert all(record["loss_scale"] == 65536 and not record["skipped"] for record in found[1] if dtype == torch.float16)
    assert found[0][1]["loss"] != found[1][1]["loss"]  # it did compute in another type
    for one, other in zip(*found, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=2e-2)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-1)


def test_log_probs_and_hidden_gradients_are_those_of_the_type() -> None:
    """The whole forward is inside: log-probs float32, and off by more than float32's rounding."""
    engine = lora_engine(moved=True)
    plain_N = engine.logprobs(pair_trees(2)).logprob_N
    low_N = replace(engine, autocast=torch.bfloat16).logprobs(pair_trees(2)).logprob_N
    assert low_N.dtype == torch.float32
    assert 1e-4 < float((low_N - plain_N).detach().abs().max()) < 0.5


def test_an_overflow_makes_no_update_and_does_not_move_the_schedule(tmp_path: Path) -> None:
    """TRAPS 68, F21: the second of six steps is skipped; the third takes its learning rate."""
    trial = Trial(tmp_path, STAGE, dropout=0.0)
    engine, watcher = engine_of(trial, torch.float16), Watcher()
    overflow(engine, 2)
    trial.run(watcher, engine=engine)
    records = read_records(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert [record["skipped"] for record in records] == [False, True, False, False, False, False]
    assert [record["loss_scale"] for record in records] == [65536, 65536, 32768, 32768, 32768, 32768]
    assert records[1]["grad_norm"] is None
    rates = [1e-3 * lr_multiplier(step, 6, warmup_fraction=0.03, kind="cosine") for step in (1, 2, 2, 3, 4, 5)]
    assert [record["lr"] for record in records] == rates
    first, second, last = (load_checkpoint(tmp_path / "checkpoints" / f"step-{step}") for step in (1, 2, 6))
    for name, weight in first.weights.items():
        assert weight.equal(second.weights[name])
        assert first.optimizer[f"exp_avg.{name}"].equal(second.optimizer[f"exp_avg.{name}"])
        assert last.optimizer[f"step.{name}"].item() == 5
    assert (second.state.num_skipped, second.state.skips_in_row) == (1, 1)
    assert (last.state.num_skipped, last.state.skips_in_row) == (1, 0)
    assert [text for text in watcher.texts if "overflowed" in text] == [
        "step 2: gradients overflowed at a loss scale of 65536, so no update was made; the scale is 32768 now"
    ]


def test_endless_overflows_stop_the_run(tmp_path: Path) -> None:
    trial = Trial(tmp_path, STAGE.model_copy(update={"epochs": 20}), dropout=0.0)
    engine = engine_of(trial, torch.float16)
    start = weights_of(engine)
    overflow(engine)
    with pytest.raises(
        NumericsError, match=r"stage sft, step 26: the gradients overflowed float16 in 26 steps"
    ) as caught:
        trial.run(engine=engine)
    assert caught.value.exit_code == 4
    assert "trained in bfloat16" in str(caught.value)
    assert "model.dtype: float32" in str(caught.value)
    assert all(weight.equal(start[name]) for name, weight in weights_of(engine).items())
    assert len(read_records(tmp_path / "metrics.jsonl")) == 26


def test_25_skips_are_allowed() -> None:
    refuse_endless_skips(MAX_SKIPS, 0.001, where="here")
    with pytest.raises(NumericsError, match="26 steps in a row"):
        refuse_endless_skips(MAX_SKIPS + 1, 0.001, where="here")


@pytest.mark.parametrize("crash", [3, 5])  # goes on from step 2, a skipped one, and from 4
def test_float16_resumes_bit_by_bit(tmp_path: Path, crash: int) -> None:
    """The loss scale, the number of updates, weights and moments; the second step was skipped."""
    trials = [Trial(tmp_path / name, STAGE, dropout=0.0) for name in ("whole", "broken")]
    for trial, stop in zip(trials, (0, crash), strict=True):
        engine = engine_of(trial, torch.float16)
        overflow(engine, 2)
        if not stop:
            trial.run(engine=engine)
            continue
        with pytest.raises(ConnectionAbortedError):
            trial.run(Watcher(stop), engine=engine)
        trial.run(engine=engine_of(trial, torch.float16))
    for name in ("metrics.jsonl", *(f"checkpoints/step-6/{file}" for file in (WEIGHTS, OPTIMIZER, STATE))):
        assert (trials[0].folder / name).read_bytes() == (trials[1].folder / name).read_bytes(), name


def test_another_precision_is_another_stage(tmp_path: Path) -> None:
    trial = Trial(tmp_path, STAGE.model_copy(update={"max_steps": 1}), dropout=0.0)
    trial.run()
    with pytest.raises(ResumeError, match="precision: None there, 'float16' now"):
        trial.run(engine=engine_of(trial, torch.float16))


def test_a_lost_number_is_an_error_in_float16_too(tmp_path: Path) -> None:
    """A log-prob that is not finite is no overflow of the loss scale: no lower scale would help."""
    trial = Trial(tmp_path, STAGE, dropout=0.0)
    engine = engine_of(trial, torch.float16)
    engine.model.model.norm.register_forward_hook(lambda module, inputs, output: output * math.nan)
    with pytest.raises(NumericsError, match="log-probs that are not finite in tree-"):
        trial.run(engine=engine)


def test_the_engine_says_what_it_computes_in() -> None:
    engine = lora_engine()
    assert engine.dtype == torch.float32
    assert replace(engine, autocast=torch.bfloat16).dtype == torch.bfloat16
