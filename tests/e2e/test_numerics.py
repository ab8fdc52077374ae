"""F20 to F23, TRAPS 61, 68, 69: what a run does where numbers are lost, and that nothing else moves."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from tests.support.lost import Loser, clean_trees, train, with_bad_token
from tests.support.training import MACHINE, Trial, answer_trees, dpo_stage, lora_engine, sft_stage, weights_of
from tunesmith.data.types import Tree
from tunesmith.engine.engine import Engine
from tunesmith.engine.retry import Budget
from tunesmith.errors import NumericsError, ResourceError
from tunesmith.model.machine import Machine
from tunesmith.objectives import supervised
from tunesmith.runs.records import Record, Value, read_records
from tunesmith.sample.generate import generate
from tunesmith.train.checkpoint import OPTIMIZER, STATE, WEIGHTS, Checkpoint, list_steps, load_checkpoint
from tunesmith.train.evaluate import evaluate
from tunesmith.train.nonfinite import Case, examine
from tunesmith.train.optim import trainable_parameters
from tunesmith.train.progress import Silent
from tunesmith.train.schedule import Kind, lr_multiplier
from tunesmith.train.step import Batch


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


# skipping by policy

SKIP = sft_stage(batch_size=2, epochs=2, save_every=1, keep_checkpoints=9, on_nonfinite="skip", learning_rate=1e-3)


def bad_rows(*numbers: int, count: int = 8) -> list[Tree]:
    trees = clean_trees(count)
    for number in numbers:
        trees[number] = with_bad_token(trees[number])
    return trees


def engine_that_loses(place: str = "forward", dtype: torch.dtype | None = None) -> Engine:
    engine = replace(lora_engine(moved=True, dropout=0.1), autocast=dtype)
    Loser("forward" if place == "forward" else "backward").watch(engine.model)
    return engine


@pytest.mark.parametrize("place", ["forward", "backward"])
def test_a_step_is_left_out_and_nothing_else_moves(tmp_path: Path, place: str) -> None:
    """One bad row of eight, two rows a step, two epochs: one step of each epoch is left out, and the schedule waits."""
    watcher = Watcher()
    engine = engine_that_loses(place)
    train(engine, bad_rows(5), tmp_path, stage=SKIP, observer=watcher)
    records = read_records(tmp_path / "metrics.jsonl")
    left = [record["step"] for record in records if record.get("nonfinite")]
    assert len(records) == 8
    assert len(left) == 2
    counts = [sum(step <= at for step in left) for at in range(9)]  # left out up to and with a step
    rates = [1e-3 * _multiplier(step - counts[step - 1], 8) for step in range(1, 9)]
    assert [record["lr"] for record in records] == rates
    for step in left:
        record = records[step - 1]
        assert (record["loss"], record["grad_norm"], record["skipped"]) == (None, None, True)
        before, after = (_checkpoint(tmp_path, number) for number in (step - 1, step))
        for one, other in ((before.weights, after.weights), (before.optimizer, after.optimizer)):
            assert all(tensor.equal(other[name]) for name, tensor in one.items())
        assert (tmp_path / f"nonfinite/step-{step}/report.json").is_file()
    state = _checkpoint(tmp_path, 8).state
    assert (state.num_skipped, state.num_nonfinite, state.num_updates) == (2, 2, 6)
    lines = [line for line in read_records(tmp_path / "warnings.jsonl") if line["kind"] == "left out"]
    assert [line["step"] for line in lines] == left
    assert all("tree-5" in line["rows"] for line in lines)
    assert sum("no update was made, and the run goes on" in text for text in watcher.texts) == 2


def _multiplier(step: int, num_steps: int, kind: Kind = "cosine") -> float:
    return lr_multiplier(step, num_steps, warmup_fraction=0.03, kind=kind)


def _checkpoint(folder: Path, step: int) -> Checkpoint:
    return load_checkpoint(folder / "checkpoints" / f"step-{step}")


def test_no_more_than_max_nonfinite_steps_are_left_out(tmp_path: Path) -> None:
    """Every row is bad: one step may be left out, the second ends the run with exit code 4."""
    stage = SKIP.model_copy(update={"max_nonfinite": 1})
    engine = engine_that_loses()
    start = weights_of(engine)
    with pytest.raises(NumericsError, match="1 steps were left out before it, and `max_nonfinite` allows no more") as e:
        train(engine, bad_rows(*range(8)), tmp_path, stage=stage)
    assert e.value.exit_code == 4
    assert e.value.where == "stage sft, step 2"
    assert len(read_records(tmp_path / "metrics.jsonl")) == 1
    assert all(weight.equal(start[name]) for name, weight in weights_of(engine).items())


def test_stopped_at_a_bad_row_the_run_goes_on_with_the_other_policy(tmp_path: Path) -> None:
    """Nothing between the last save and the bad step is trained again, and the end is that of skipping at once."""
    stop = SKIP.model_copy(update={"on_nonfinite": "stop", "save_every": 0})
    with pytest.raises(NumericsError):
        train(engine_that_loses(), bad_rows(5), tmp_path / "twice", stage=stop)
    (saved,) = list_steps(tmp_path / "twice/checkpoints")
    assert saved == len(read_records(tmp_path / "twice/metrics.jsonl"))
    outcome = train(engine_that_loses(), bad_rows(5), tmp_path / "twice", stage=SKIP)
    assert outcome.resumed_step == saved
    train(engine_that_loses(), bad_rows(5), tmp_path / "once", stage=SKIP)
    _assert_same_end(tmp_path / "once", tmp_path / "twice", step=8)


@pytest.mark.parametrize(
    ("crash", "dtype"), [(2, None), (3, None), (5, None), (8, None), (3, torch.float16), (7, torch.float16)]
)
def test_a_run_with_steps_left_out_resumes_bit_by_bit(tmp_path: Path, crash: int, dtype: torch.dtype | None) -> None:
    """Wherever it is broken off: counts, schedule, weights, moments, loss scale, records, warnings."""
    for name, last in (("whole", 0), ("broken", crash)):
        try:
            train(engine_that_loses(dtype=dtype), bad_rows(5), tmp_path / name, stage=SKIP, observer=Watcher(last))
        except ConnectionAbortedError:
            train(engine_that_loses(dtype=dtype), bad_rows(5), tmp_path / name, stage=SKIP)
    _assert_same_end(tmp_path / "whole", tmp_path / "broken", step=8)
    assert _checkpoint(tmp_path / "whole", 8).state.num_nonfinite == 2
    records = read_records(tmp_path / "whole/metrics.jsonl")
    for record, after in pairwise(records):
        if record.get("nonfinite"):  # a lost log-prob is no overflow: the scale has not seen it
            assert record.get("loss_scale") == after.get("loss_scale")


def _assert_same_end(one: Path, other: Path, *, step: int) -> None:
    files = [f"checkpoints/step-{step}/{name}" for name in (WEIGHTS, OPTIMIZER, STATE)]
    for name in ("metrics.jsonl", "warnings.jsonl", *files):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


# trap 61, 68: the learning rate is the closed form of the number of updates


def _schedule(folder: Path, *, forest_tokens: int, kind: Kind, machine: Machine, skips: bool) -> list[Record]:
    """Six steps of four rows; a forest is one row, about two, or all. With `skips` the third step overflows."""
    stage = sft_stage(epochs=2, forest_tokens=forest_tokens, schedule=kind, learning_rate=1e-3, max_grad_norm=0)
    trial = Trial(folder, stage, dropout=0.0)
    engine = replace(trial.engine(), autocast=torch.float16 if skips else None)
    if skips:
        _overflow_in_step(engine, 3)
    trial.run(_Counter(engine) if skips else None, engine=engine, machine=machine)
    return read_records(folder / "metrics.jsonl")


class _Counter(Silent):
    """Tells the engine's hook which step it is in."""

    def __init__(self, engine: Engine) -> None:
        self.model = engine.model

    def stepped(self, record: Mapping[str, Value], timing: Mapping[str, Value]) -> None:
        self.model.config.step_under_way = int(str(record["step"])) + 1


def _overflow_in_step(engine: Engine, step: int) -> None:
    config = engine.model.config
    config.step_under_way = 1
    weight = next(parameter for parameter in engine.model.parameters() if parameter.requires_grad)
    weight.register_hook(lambda gradient: gradient * (math.inf if config.step_under_way == step else 1.0))


# 4 micro-batches a step, about 3, 1
@pytest.mark.parametrize(
    ("forest_tokens", "skips", "kind"),
    [
        *((forest_tokens, skips, "cosine") for forest_tokens in (1, 40, 10_000) for skips in (False, True)),
        (40, False, "linear"),
        (40, True, "constant"),
    ],
)
def test_the_rate_is_the_closed_form_whatever_the_micro_batches(
    tmp_path: Path, forest_tokens: int, skips: bool, kind: Kind
) -> None:
    records = _schedule(tmp_path, forest_tokens=forest_tokens, kind=kind, machine=MACHINE, skips=skips)
    updates = [1, 2, 3, 3, 4, 5] if skips else [1, 2, 3, 4, 5, 6]  # the third is tried again, at its own rate
    assert [record["lr"] for record in records] == [1e-3 * _multiplier(number, 6, kind) for number in updates]
    assert [bool(record.get("skipped")) for record in records] == [skips and step == 3 for step in range(1, 7)]
    if not skips:  # the last rate is the schedule's own: one step more would be 0
        last = {"constant": 1.0, "linear": 1 / 5, "cosine": 0.5 * (1 + math.cos(math.pi * 4 / 5))}[kind]
        assert records[-1]["lr"] == pytest.approx(1e-3 * last, rel=1e-12)


def _schedule_rank(rank: int, world_size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=world_size)
    machine = Machine(torch.device("cpu"), rank, world_size)
    for forest_tokens in (1, 10_000):
        place = folder / str(forest_tokens)
        _schedule(place, forest_tokens=forest_tokens, kind="cosine", machine=machine, skips=False)
    with pytest.raises(NumericsError, match="tree-1"):
        train(engine_that_loses(), bad_rows(1), folder / "lost", stage=sft_stage(batch_size=8), machine=machine)
    dist.destroy_process_group()


def test_two_ranks_step_the_schedule_once(tmp_path: Path) -> None:
    """And a number that one of them loses stops both, with one reproducer."""
    mp.spawn(_schedule_rank, args=(2, tmp_path), nprocs=2)
    for forest_tokens in (1, 10_000):
        records = read_records(tmp_path / str(forest_tokens) / "metrics.jsonl")
        assert [record["lr"] for record in records] == [1e-3 * _multiplier(step, 6) for step in range(1, 7)]
    report = json.loads((tmp_path / "lost/nonfinite/step-1/report.json").read_text())
    assert report["world_size"] == 2
    assert report["found"]["place"]["row"] == "tree-1"


# trap 69: modes


def modes_of(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("what", ["evaluate", "sample", "examine"])
def test_modes_are_as_before(what: str, fails: bool) -> None:
    """Module by module, after an evaluation, a generation, an examination; also where they end in an exception."""
    engine = lora_engine(moved=True, dropout=0.1)
    for number, module in enumerate(engine.model.modules()):
        module.training = number % 3 == 0
    before = modes_of(engine.model)
    seen: list[bool] = []

    def look(module: nn.Module, inputs: object) -> None:
        seen.append(any(modes_of(engine.model)))
        if fails:
            raise ZeroDivisionError

    engine.model.get_submodule("model.norm").register_forward_pre_hook(look)
    try:
        if what == "evaluate":
            evaluate(engine, Batch(answer_trees(2)), objective=supervised("sft"), forest_tokens=50, machine=MACHINE)
        elif what == "sample":
            generate(engine.model, [[5, 6, 7]], max_new_tokens=3, stop_ids=[2])
        else:
            Loser().watch(engine.model)
            _examine(engine)
        assert not fails
    except ZeroDivisionError:
        assert fails
    assert seen
    assert any(seen) == (what == "examine")  # which runs in the step's own modes
    assert modes_of(engine.model) == before


def _examine(engine: Engine) -> None:
    batch = Batch([with_bad_token(clean_trees(1)[0])])
    case = Case(engine, batch, supervised("sft"), Budget(99), MACHINE, "k", trainable_parameters(engine.model))
    examine(case, "log-prob", "lost.", logprob_N=torch.full((6,), math.nan), trees=[0])


@pytest.mark.parametrize("fails_in", ["evaluation", "save", "step"])
def test_modes_are_as_before_a_stage_that_fails(tmp_path: Path, fails_in: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training mode is on inside the stage alone, whatever ends it."""

    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    places = {"evaluation": "evaluating.evaluate", "save": "loop._save", "step": "loop.step_gradient"}
    engine = lora_engine(moved=True, dropout=0.1)
    before = modes_of(engine.model)
    monkeypatch.setattr(f"tunesmith.train.{places[fails_in]}", fail)
    with pytest.raises(ZeroDivisionError):
        train(engine, clean_trees(4), tmp_path, heldout=clean_trees(2) if fails_in == "evaluation" else [])
    assert modes_of(engine.model) == before


# F22, F23


def test_a_spike_and_what_it_may_come_from(tmp_path: Path) -> None:
    """F22: the tenth step's loss is made 30 times as large; rows and causes are named once, in terminal and file."""
    trees = clean_trees(4)
    watcher = Watcher()
    engine = lora_engine()
    calls = [0]

    def scale(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        calls[0] += 1
        return output * (60.0 if calls[0] == 10 else 1.0)

    engine.model.get_submodule("model.norm").register_forward_hook(scale)
    train(engine, trees, tmp_path, observer=watcher, epochs=14, forest_tokens=10_000, learning_rate=1e-3)
    lines = read_records(tmp_path / "warnings.jsonl")
    assert [(line["step"], line["kind"]) for line in lines] == [(10, "loss spike"), (10, "gradient spike")]
    assert sorted(lines[0]["rows"]) == [tree.id for tree in trees]
    (text,) = (text for text in watcher.texts if text.startswith("WARNING step 10: the loss is"))
    assert "Possible causes: rows unlike the others: look at this step's; a learning rate that is too high" in text


def test_pairs_without_a_difference_are_said_to_teach_nothing(tmp_path: Path) -> None:
    """F22: chosen equals rejected in every pair, so every gradient is 0 but for rounding."""
    trees = [replace(tree, branches=tree.branches[:1] * 2) for tree in clean_trees(4)]
    train(lora_engine(moved=True), trees, tmp_path, stage=dpo_stage(epochs=4))
    kinds = [line["kind"] for line in read_records(tmp_path / "warnings.jsonl")]
    assert kinds == ["zero gradient"]


def test_memory_that_runs_out_in_mid_run_loses_no_step(tmp_path: Path) -> None:
    """F23: the fourth step cannot be computed however small; the third is saved, and the next start goes on there."""
    stage = sft_stage(batch_size=2, epochs=1, save_every=0, forest_tokens=10_000)
    engine = lora_engine(moved=True)
    train_rows = clean_trees(12)
    seen = [0]

    def fail(module: nn.Module, inputs: object) -> None:
        seen[0] += 1
        if seen[0] > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    engine.model.get_submodule("model.layers.1").register_forward_pre_hook(fail)
    with pytest.raises(ResourceError, match="step 4") as caught:
        train(engine, train_rows, tmp_path / "broken", stage=stage)
    assert caught.value.exit_code == 5
    assert list_steps(tmp_path / "broken/checkpoints") == [3]
    outcome = train(lora_engine(moved=True), train_rows, tmp_path / "broken", stage=stage)
    assert (outcome.resumed_step, outcome.num_steps) == (3, 6)


def test_a_held_out_loss_that_is_no_number_is_never_the_best(tmp_path: Path) -> None:
    """The held-out rows hold the bad token: a warning, and the result is the last step."""
    engine = engine_that_loses()
    outcome = train(
        engine, clean_trees(4), tmp_path, heldout=[with_bad_token(clean_trees(9)[8])], keep="best", eval_every=1
    )
    assert outcome.best_step is None
    assert outcome.result_step == outcome.num_steps
    assert [line["kind"] for line in read_records(tmp_path / "warnings.jsonl")] == ["held-out loss"]
