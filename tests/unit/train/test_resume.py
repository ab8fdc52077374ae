"""R1, R3, R6: a stage that was broken off goes on as if it had never stopped, or not at all."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
from safetensors.torch import load_file

from tests.support.optional import needs_bitsandbytes
from tests.support.training import Trial, dpo_stage, full_engine, sft_stage, weights_of
from tunesmith.errors import ResumeError, StoppedError
from tunesmith.recipe.models import DpoStage, Full, Lora, Replay, SftStage, Source
from tunesmith.runs.atomic import sha256_file
from tunesmith.runs.inventory import digest
from tunesmith.runs.records import Value, read_records
from tunesmith.runs.stop import REPEAT_SECONDS
from tunesmith.train.checkpoint import MANIFEST, OPTIMIZER, STATE, WEIGHTS, list_steps
from tunesmith.train.loop import StageOutcome
from tunesmith.train.progress import Silent

# 11 rows, 4 a step: 3 steps an epoch (the last has 3 rows), 9 steps
LORA = Lora(r=4, dropout=0.1)
REPLAY = Replay(sources=[Source(path="y")], examples_per_step=2)
CADENCE = {"epochs": 3, "eval_every": 2, "save_every": 2, "keep_checkpoints": 3}
STAGES: dict[str, tuple[SftStage | DpoStage, str]] = {
    "sft, lora, dropout": (sft_stage(tuning=LORA, replay=REPLAY, **CADENCE), "llama"),
    "sft, full, dropout": (sft_stage(tuning=Full(), learning_rate=1e-3, weight_decay=0.1, **CADENCE), "gpt2"),
    "dpo, lora, dropout": (dpo_stage(tuning=LORA, **CADENCE), "llama"),
    "dpo, full": (dpo_stage(tuning=Full(), learning_rate=1e-3, **CADENCE), "llama"),
}


class Crash(Silent):
    """Breaks off after a step, as a power cut would: nothing is saved."""

    def __init__(self, step: int) -> None:
        self._step = step

    def stepped(self, record: Mapping[str, Value], timing: Mapping[str, Value]) -> None:
        if record["step"] == self._step:
            raise ConnectionAbortedError


class Kill(Silent):
    """Sends this process a signal after a step."""

    def __init__(self, step: int, number: signal.Signals, times: int = 1) -> None:
        self._step, self._number, self._times = step, number, times

    def stepped(self, record: Mapping[str, Value], timing: Mapping[str, Value]) -> None:
        for _ in range(self._times if record["step"] == self._step else 0):
            os.kill(os.getpid(), self._number)
            time.sleep(1.5 * REPEAT_SECONDS * (self._times > 1))  # closer together they are one request


class Notes(Silent):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def noted(self, text: str) -> None:
        self.texts.append(text)


@cache
def unbroken(name: str) -> tuple[Trial, StageOutcome]:
    stage, family = STAGES[name]
    trial = Trial(Path(mkdtemp()), stage, family)
    return trial, trial.run()[0]


def assert_same_end(trial: Trial, whole: Trial) -> None:
    """Bytes of records, weights and moments are equal; the records have each step once."""
    for name in ("metrics.jsonl", "eval.jsonl"):
        assert (trial.folder / name).read_bytes() == (whole.folder / name).read_bytes()
    last = "checkpoints/step-9"
    for name in (WEIGHTS, OPTIMIZER, STATE):
        assert sha256_file(trial.folder / last / name) == sha256_file(whole.folder / last / name)
    assert [record["step"] for record in read_records(trial.folder / "metrics.jsonl")] == list(range(1, 10))


@pytest.mark.parametrize("crash", [3, 5])  # goes on from step 2, in the middle of epoch 1; from 4, in the middle of 2
@pytest.mark.parametrize("name", STAGES)
def test_resumed_equals_unbroken_bit_by_bit(tmp_path: Path, name: str, crash: int) -> None:
    whole, expected = unbroken(name)
    trial = replace(whole, folder=tmp_path)
    with pytest.raises(ConnectionAbortedError):
        trial.run(Crash(crash))
    outcome, engine = trial.run()
    assert outcome == replace(expected, resumed_step=crash - 1)
    assert_same_end(trial, whole)
    assert all(p.isfinite().all() for p in weights_of(engine).values())


def test_resumed_at_the_end_of_an_epoch_and_twice(tmp_path: Path) -> None:
    """save_every is no part of the result: with 3 the saves are at the epochs' ends."""
    whole, _ = unbroken("sft, lora, dropout")
    stage = whole.stage.model_copy(update={"save_every": 3})
    trial = replace(whole, folder=tmp_path, stage=stage)
    for crash in (4, 7, 8):
        with pytest.raises(ConnectionAbortedError):
            trial.run(Crash(crash))
    assert trial.run()[0].resumed_step == 6
    assert_same_end(trial, whole)


def test_crash_before_the_first_save_starts_again(tmp_path: Path) -> None:
    whole, _ = unbroken("dpo, lora, dropout")
    trial = replace(whole, folder=tmp_path)
    with pytest.raises(ConnectionAbortedError):
        trial.run(Crash(1))
    assert trial.run()[0].resumed_step == 0
    assert_same_end(trial, whole)


def test_finished_stage_only_loads_its_weights(tmp_path: Path) -> None:
    whole, _ = unbroken("sft, lora, dropout")
    shutil.copytree(whole.folder, tmp_path / "stage")
    trial = replace(whole, folder=tmp_path / "stage")
    outcome, engine = trial.run(Crash(1))  # no step runs, so it does not crash
    assert (outcome.resumed_step, outcome.result_step) == (9, 9)
    _, again = trial.run()
    start = weights_of(trial.engine())
    for name, weight in weights_of(engine).items():
        assert weight.equal(weights_of(again)[name])
        assert not weight.equal(start[name])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 15), (signal.SIGINT, 2)])
def test_signal_finishes_the_step_saves_and_goes_on(tmp_path: Path, number: signal.Signals, code: int) -> None:
    whole, _ = unbroken("sft, lora, dropout")
    trial = replace(whole, folder=tmp_path)
    before = signal.getsignal(number)
    with pytest.raises(StoppedError, match=r"stopped by \w+ after step 3 of 9; it is saved") as caught:
        trial.run(Kill(3, number))
    assert caught.value.signal_number == code
    assert signal.getsignal(number) is before
    assert list_steps(tmp_path / "checkpoints")[-1] == 3
    assert trial.run()[0].resumed_step == 3
    assert_same_end(trial, whole)


def test_second_signal_stops_at_once_and_stays_consistent(tmp_path: Path) -> None:
    whole, _ = unbroken("sft, lora, dropout")
    trial = replace(whole, folder=tmp_path)
    with pytest.raises(StoppedError, match="at once"):
        trial.run(Kill(3, signal.SIGINT, times=2))
    assert list_steps(tmp_path / "checkpoints") == [2]
    trial.run()
    assert_same_end(trial, whole)


@pytest.mark.parametrize("name", [WEIGHTS, OPTIMIZER, STATE, MANIFEST])
def test_damaged_newest_checkpoint_goes_back_loudly_and_ends_equal(tmp_path: Path, name: str) -> None:
    whole, _ = unbroken("dpo, lora, dropout")
    trial = replace(whole, folder=tmp_path)
    with pytest.raises(ConnectionAbortedError):
        trial.run(Crash(7))
    (tmp_path / "checkpoints" / "step-6" / name).unlink()
    notes = Notes()
    outcome, _ = trial.run(notes)
    assert outcome.resumed_step == 4
    assert any("step-6" in text and name in text for text in notes.texts)
    assert_same_end(trial, whole)


def test_a_removed_record_is_not_passed_over(tmp_path: Path) -> None:
    whole, _ = unbroken("sft, lora, dropout")
    trial = replace(whole, folder=tmp_path)
    with pytest.raises(ConnectionAbortedError):
        trial.run(Crash(5))
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_bytes(b"".join(metrics.read_bytes().splitlines(keepends=True)[1:]))
    with pytest.raises(ResumeError, match=r"metrics\.jsonl: has 3 records for the 4 steps"):
        trial.run()


def test_torn_last_record_is_made_again(tmp_path: Path) -> None:
    whole, _ = unbroken("sft, lora, dropout")
    trial = replace(whole, folder=tmp_path)
    with pytest.raises(ConnectionAbortedError):
        trial.run(Crash(5))
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-9])
    trial.run()
    assert_same_end(trial, whole)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"learning_rate": 0.5}, "stage.learning_rate: 0.01 there, 0.5 now"),
        ({"batch_size": 5}, "stage.batch_size: 4 there, 5 now"),
        ({"tuning": Lora(r=4, alpha=8.0)}, "stage.tuning"),
        pytest.param(
            {"optimizer": "adamw_8bit"}, "stage.optimizer: None there, 'adamw_8bit' now", marks=needs_bitsandbytes
        ),
        ({"schedule": "linear"}, "stage.schedule: 'cosine' there, 'linear' now"),
        ({"epochs": 1}, "is past the 3 steps"),
    ],
)
def test_changed_recipe_is_refused_and_nothing_changes(tmp_path: Path, change: dict[str, object], said: str) -> None:
    whole, _ = unbroken("sft, lora, dropout")
    shutil.copytree(whole.folder, tmp_path / "stage")
    before = {path: path.read_bytes() for path in (tmp_path / "stage").rglob("*") if path.is_file()}
    trial = replace(whole, folder=tmp_path / "stage", stage=whole.stage.model_copy(update=change))
    with pytest.raises(ResumeError) as caught:
        trial.run()
    assert said in str(caught.value)
    assert caught.value.exit_code == 3
    assert before == {path: path.read_bytes() for path in (tmp_path / "stage").rglob("*") if path.is_file()}


def test_changed_rows_are_refused(tmp_path: Path) -> None:
    whole, _ = unbroken("sft, lora, dropout")
    shutil.copytree(whole.folder, tmp_path / "stage")
    with pytest.raises(ResumeError, match=r"rows\.train: '11, sha256 [\s\S]* now"):
        replace(whole, folder=tmp_path / "stage", num_train=10).run()


def test_another_reference_is_refused(tmp_path: Path) -> None:
    """TRAPS 42: going on from trained weights as if they were the start would move the reference."""
    whole, _ = unbroken("dpo, lora, dropout")
    trial = replace(whole, folder=tmp_path)
    with pytest.raises(ConnectionAbortedError):
        trial.run(Crash(5))
    with pytest.raises(ResumeError, match="the reference is another model: its mean log-prob moved by"):
        trial.run(engine=whole.run()[1])


def test_more_steps_go_on_and_say_so(tmp_path: Path) -> None:
    whole, _ = unbroken("sft, lora, dropout")
    shutil.copytree(whole.folder, tmp_path / "stage")
    stage = whole.stage.model_copy(update={"epochs": 4})
    notes = Notes()
    outcome, _ = replace(whole, folder=tmp_path / "stage", stage=stage).run(notes)
    assert (outcome.resumed_step, outcome.result_step) == (9, 12)
    assert any("had 9 steps and has 12 now" in text for text in notes.texts)


def test_leftovers_of_a_killed_save_are_removed(tmp_path: Path) -> None:
    whole, _ = unbroken("sft, lora, dropout")
    trial = replace(whole, folder=tmp_path)
    left = tmp_path / "checkpoints" / ".tmp-step-4-123"
    left.mkdir(parents=True)
    (left / WEIGHTS).write_bytes(b"half")
    trial.run()
    assert not left.exists()
    assert_same_end(trial, whole)


def test_a_checkpoint_made_before_there_were_optimizers_goes_on(tmp_path: Path) -> None:
    """R7: its state knows nothing of skipped steps, and its identity names no optimizer."""
    whole, _ = unbroken("sft, lora, dropout")
    trial = replace(whole, folder=tmp_path)
    with pytest.raises(ConnectionAbortedError):
        trial.run(Crash(3))
    path = tmp_path / "checkpoints" / "step-2"
    state = json.loads((path / STATE).read_text())
    assert "stage.optimizer" not in state["identity"]
    later = ("num_skipped", "skips_in_row", "scaler", "asked_tokens", "forest_tokens", "tree_tokens", "checkpointing")
    for name in (*later, "attention", "tunesmith_version", "carried"):
        del state[name]
    (path / STATE).write_text(json.dumps(state))
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["files"][STATE] = {"bytes": (path / STATE).stat().st_size, "sha256": sha256_file(path / STATE)}
    del manifest["files_sha256"]
    (path / MANIFEST).write_text(json.dumps(manifest))
    assert trial.run()[0].resumed_step == 2
    assert_same_end(trial, whole)


@needs_bitsandbytes
@pytest.mark.parametrize("kind", ["adamw_8bit", "paged_adamw", "paged_adamw_8bit"])
def test_every_optimizer_resumes_bit_by_bit(tmp_path: Path, kind: str) -> None:
    """Embeddings and layers of 6,144 and 4,096 numbers have 8-bit moments, the others' stay float32."""
    stage = sft_stage(tuning=Full(), optimizer=kind, learning_rate=1e-3, save_every=1, epochs=1)
    trials = [Trial(tmp_path / name, stage) for name in ("whole", "broken")]
    for trial in trials:
        engine = full_engine(hidden_size=64)
        if trial is trials[1]:
            with pytest.raises(ConnectionAbortedError):
                trial.run(Crash(3), engine=engine)
            engine = full_engine(hidden_size=64)
        trial.run(engine=engine)
    types = {str(tensor.dtype) for tensor in load_file(tmp_path / "whole/checkpoints/step-3" / OPTIMIZER).values()}
    assert ("torch.uint8" in types) == kind.endswith("8bit")
    for name in ("metrics.jsonl", *(f"checkpoints/step-3/{file}" for file in (WEIGHTS, OPTIMIZER, STATE))):
        assert (trials[0].folder / name).read_bytes() == (trials[1].folder / name).read_bytes(), name


def test_a_damaged_best_checkpoint_is_refused_at_the_start_and_not_after_the_last_step(tmp_path: Path) -> None:
    stage = sft_stage(tuning=LORA, keep="best", learning_rate=0.5, **(CADENCE | {"save_every": 1, "eval_every": 1}))
    trial = Trial(tmp_path, stage)
    with pytest.raises(ConnectionAbortedError):
        trial.run(Crash(8))
    newest = json.loads((tmp_path / "checkpoints/step-7" / STATE).read_text())
    best = newest["best_step"]
    assert best < 7  # the rate is so high that the first steps are the best
    weights = tmp_path / f"checkpoints/step-{best}" / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ResumeError, match=rf"step-{best}: the checkpoint of the best step so far: {WEIGHTS} has"):
        trial.run()
    shutil.rmtree(weights.parent)
    with pytest.raises(ResumeError, match="the best step so far: is missing"):
        trial.run()
    final = replace(trial, stage=stage.model_copy(update={"keep": "final"}))
    assert final.run()[0].result_step == 9  # as the remedy says


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"threads": 64}, "threads 64, now 1"),
        ({"torch_version": "1.13.0"}, "torch 1.13.0, now 2"),
        ({"attention": "varlen"}, "the attention kernel varlen, now sdpa"),
        ({"asked_tokens": 4096}, "tokens of a micro-batch 4096, now 90"),
        ({"checkpointing": "full"}, "gradient checkpointing full, now none"),
    ],
)
def test_what_rounds_otherwise_is_told_and_the_stage_goes_on(
    tmp_path: Path, changes: dict[str, object], said: str
) -> None:
    """F13 and its kin: the bitwise promise is void, and that is said once."""
    whole, _ = unbroken("sft, lora, dropout")
    trial = replace(whole, folder=tmp_path)
    with pytest.raises(ConnectionAbortedError):
        trial.run(Crash(3))
    edit_state(tmp_path / "checkpoints/step-2", changes)
    notes = Notes()
    assert trial.run(notes)[0].resumed_step == 2
    told = [text for text in notes.texts if "the result can differ in rounding" in text]
    assert len(told) == 1
    assert said in told[0]
    assert told[0].count(", now ") == 1  # the others are as they were


def edit_state(path: Path, changes: dict[str, object]) -> None:
    """Write other values into a checkpoint's state, with a manifest that agrees."""
    state = json.loads((path / STATE).read_text()) | changes
    (path / STATE).write_text(json.dumps(state))
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["files"][STATE] = {"bytes": (path / STATE).stat().st_size, "sha256": sha256_file(path / STATE)}
    (path / MANIFEST).write_text(json.dumps(manifest | {"files_sha256": digest(manifest["files"])}))


def test_a_lowered_budget_is_the_checkpoint_s_also_where_its_record_is_lost(tmp_path: Path) -> None:
    """budget.jsonl says at which step memory ran out; without it the steps to come still have the lowered budget."""
    whole, _ = unbroken("sft, lora, dropout")
    trial = replace(whole, folder=tmp_path)
    with pytest.raises(ConnectionAbortedError):
        trial.run(Crash(3))
    edit_state(tmp_path / "checkpoints/step-2", {"forest_tokens": 45, "tree_tokens": 30})
    trial.run()
    state = json.loads((tmp_path / "checkpoints/step-9" / STATE).read_text())
    assert (state["asked_tokens"], state["forest_tokens"], state["tree_tokens"]) == (90, 45, 30)
    other = replace(trial, stage=trial.stage.model_copy(update={"forest_tokens": 80, "epochs": 4}))
    other.run()  # another size was asked for, so the old lowering says nothing
    state = json.loads((tmp_path / "checkpoints/step-12" / STATE).read_text())
    assert (state["asked_tokens"], state["forest_tokens"], state["tree_tokens"]) == (80, 80, None)


@pytest.mark.parametrize("field", ["template", "base"])
def test_another_template_or_base_is_refused(tmp_path: Path, field: str) -> None:
    """F10: what `pipeline` hands down as hashes is compared field by field; so are tensors' shapes (another rank)."""
    whole, _ = unbroken("sft, lora, dropout")
    path = tmp_path / "stage"
    shutil.copytree(whole.folder, path)
    identity = json.loads((path / "checkpoints/step-9" / STATE).read_text())["identity"]
    edit_state(path / "checkpoints/step-9", {"identity": identity | {f"input.{field}": "another"}})
    with pytest.raises(ResumeError, match=rf"input\.{field}: 'another' there"):
        replace(whole, folder=path).run()


def test_another_rank_is_refused(tmp_path: Path) -> None:
    whole, _ = unbroken("sft, lora, dropout")
    path = tmp_path / "stage"
    shutil.copytree(whole.folder, path)
    stage = whole.stage.model_copy(update={"tuning": Lora(r=8, dropout=0.1)})
    with pytest.raises(ResumeError, match=r"stage\.tuning: \{[\s\S]*'r': 4[\s\S]* there"):
        replace(whole, folder=path, stage=stage).run()
