from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.support.training import (
    MACHINE,
    Trial,
    answer_trees,
    dpo_stage,
    lora_engine,
    pair_trees,
    references_of,
    sft_stage,
    text_trees,
    weights_of,
)
from tunesmith.data.types import Tree
from tunesmith.engine.engine import Engine
from tunesmith.engine.logprobs import Extra, Logprobs
from tunesmith.errors import NumericsError, RecipeError
from tunesmith.objectives import objective_of
from tunesmith.recipe.models import Full, Lora, Replay, Source
from tunesmith.runs.folder import StageFolder
from tunesmith.runs.records import Value, read_records
from tunesmith.train.checkpoint import list_steps, load_checkpoint
from tunesmith.train.loop import train_stage
from tunesmith.train.progress import Silent
from tunesmith.train.schedule import lr_multiplier


def test_records_of_an_sft_stage(tmp_path: Path) -> None:
    """13 rows, 4 a step, 2 epochs: 4 steps an epoch, the last with one row; 2 texts are replayed each step."""
    replay = Replay(sources=[Source(path="y")], examples_per_step=2)
    trial = Trial(tmp_path, sft_stage(replay=replay, epochs=2, eval_every=3, save_every=0), num_train=13)
    outcome, _ = trial.run()
    records = read_records(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 9))
    assert [record["num_examples"] for record in records] == [4, 4, 4, 1, 4, 4, 4, 1]
    assert {record["num_replay"] for record in records} == {2}
    assert [record["epoch"] for record in records] == [step / 4 for step in range(1, 9)]
    assert [record["lr"] for record in records] == [
        0.01 * lr_multiplier(step, 8, warmup_fraction=0.03, kind="cosine") for step in range(1, 9)
    ]
    own = sum(tree.num_tokens for tree in answer_trees(13))
    texts = sum(_tokens(record) for record in records) - 2 * own
    assert texts > 0
    assert list(records[0]) == [
        *("step", "epoch", "loss", "lr", "grad_norm", "num_examples", "num_replay", "num_tokens", "num_trained")
    ]
    assert [record["step"] for record in read_records(tmp_path / "eval.jsonl")] == [0, 3, 6, 8]
    assert [record["step"] for record in read_records(tmp_path / "timings.jsonl")] == list(range(1, 9))
    assert outcome.num_steps == outcome.result_step == 8
    assert outcome.best_step in list_steps(tmp_path / "checkpoints")


def _tokens(record: Mapping[str, Value]) -> int:
    value = record["num_tokens"]
    assert isinstance(value, int)
    return value


def test_loss_falls(tmp_path: Path) -> None:
    Trial(tmp_path, sft_stage(epochs=8, learning_rate=3e-2), dropout=0.0).run()
    records = read_records(tmp_path / "metrics.jsonl")
    first, last = records[0]["loss"], records[-2]["loss"]
    assert isinstance(first, float)
    assert isinstance(last, float)
    assert last < first - 0.5


def test_max_steps_ends_the_schedule_too(tmp_path: Path) -> None:
    Trial(tmp_path, sft_stage(epochs=3, max_steps=2, schedule="linear", warmup_fraction=0.0)).run()
    assert [record["lr"] for record in read_records(tmp_path / "metrics.jsonl")] == [0.01, 0.005]


def test_keep_best_ends_on_the_best_weights(tmp_path: Path) -> None:
    """A rate that destroys the model: the best step is early, and the model has its weights at the end."""
    stage = sft_stage(epochs=3, eval_every=1, learning_rate=0.3, schedule="constant", keep="best", keep_checkpoints=1)
    outcome, engine = Trial(tmp_path / "long", stage, dropout=0.0).run()
    losses = [record["loss"] for record in read_records(tmp_path / "long" / "eval.jsonl")][1:]
    assert outcome.best_loss == min(losses)  # type: ignore[type-var]
    assert outcome.result_step == outcome.best_step == losses.index(outcome.best_loss) + 1 < 9
    assert list_steps(tmp_path / "long" / "checkpoints") == [outcome.best_step, 9]
    short = stage.model_copy(update={"max_steps": outcome.best_step, "keep": "final"})
    _, expected = Trial(tmp_path / "short", short, dropout=0.0).run()
    for name, weight in weights_of(engine).items():
        assert weight.equal(weights_of(expected)[name])


def test_keep_best_without_heldout_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="needs held-out rows"):
        _train(lora_engine(), answer_trees(), tmp_path, keep="best")


def _train(engine: Engine, trees: Sequence[Tree], folder: Path, **changes: object) -> None:
    stage = sft_stage(**changes)
    train_stage(
        engine=engine,
        stage=stage,
        objective=objective_of(stage),
        train=trees,
        folder=StageFolder(folder),
        seed=0,
        machine=MACHINE,
    )


@pytest.mark.parametrize("stage", [sft_stage(), dpo_stage()])
@pytest.mark.parametrize("tuning", [Lora(r=4), Full()])
def test_every_trained_tensor_moves_in_two_steps_and_no_other(tmp_path: Path, stage: object, tuning: object) -> None:
    """TRAPS 54."""
    assert isinstance(stage, type(sft_stage()) | type(dpo_stage()))
    trial = Trial(tmp_path, stage.model_copy(update={"tuning": tuning, "max_steps": 2, "learning_rate": 1e-3}))
    engine = trial.engine()
    before = {name: parameter.detach().clone() for name, parameter in engine.model.named_parameters()}
    trained = set(weights_of(engine))
    trial.run(engine=engine)
    moved = {name for name, p in engine.model.named_parameters() if not p.equal(before[name])}
    assert moved == trained


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_gradient_checkpointing_changes_no_record_beyond_rounding(tmp_path: Path, name: str) -> None:
    """TRAPS 54: with LoRA, dropout on, and the preference stage's eval mode."""
    make = {"sft": sft_stage, "dpo": dpo_stage}[name]
    losses = []
    for wanted in ("none", "full"):
        folder = tmp_path / wanted
        trial = Trial(folder, make(gradient_checkpointing=wanted, epochs=1, tuning=Lora(r=4, dropout=0.1)))
        _, engine = trial.run()
        losses.append([(record["loss"], record["grad_norm"]) for record in read_records(folder / "metrics.jsonl")])
        assert not any(module.gradient_checkpointing for module in engine.model.model.layers)
    for plain, checkpointed in zip(*losses, strict=True):
        assert checkpointed == pytest.approx(plain, rel=1e-5)


def test_gradient_checkpointing_really_recomputes(tmp_path: Path) -> None:
    """A layer's forward begins once more for each backward, also in a preference stage."""
    calls = []
    for wanted in ("none", "full"):
        trial = Trial(tmp_path / wanted, dpo_stage(gradient_checkpointing=wanted, max_steps=1))
        engine = trial.engine()
        begun: list[nn.Module] = []
        engine.model.model.layers[0].input_layernorm.register_forward_pre_hook(
            lambda norm, _, to=begun: to.append(norm)
        )
        trial.run(engine=engine)
        calls.append(len(begun))
    assert calls[1] > calls[0]


@dataclass(frozen=True)
class Spoiled(Engine):
    """An engine that loses its numbers for one row."""

    row: str = ""
    value: float = math.nan

    def logprobs(self, trees: Sequence[Tree], wants: Sequence[Extra] = ()) -> Logprobs:
        found = super().logprobs(trees)
        for number, tree in enumerate(trees):
            if tree.id == self.row:
                factor_N = torch.where(found.tree_B[found.branch_N] == number, self.value, 1.0)
                return Logprobs(found.logprob_N * factor_N, found.branch_N, found.tree_B)
        return found


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_loss_that_is_not_finite_stops_before_the_update_and_names_the_row(tmp_path: Path, value: float) -> None:
    """F20."""
    engine = Spoiled(lora_engine(moved=True).model, row="tree-5", value=value)
    start = weights_of(engine)
    with pytest.raises(NumericsError, match=r"stage sft, step 1: log-probs that are not finite in tree-5\.") as caught:
        _train(engine, answer_trees(8), tmp_path, batch_size=8)
    assert caught.value.exit_code == 4
    assert all(weight.equal(start[name]) for name, weight in weights_of(engine).items())
    assert all(p.grad is None for p in engine.model.parameters())
    assert read_records(tmp_path / "metrics.jsonl") == []


def test_gradient_that_is_not_finite_stops_before_the_update(tmp_path: Path) -> None:
    """The loss is finite, one gradient is not (F21)."""
    engine = lora_engine(moved=True)
    weight = next(parameter for parameter in engine.model.parameters() if parameter.requires_grad)
    weight.register_hook(lambda grad: grad * math.inf)
    start = weights_of(engine)
    with pytest.raises(NumericsError, match=r"step 1: loss 5\.\d+, gradient norm (nan|inf); the step's rows: tree-"):
        _train(engine, answer_trees(8), tmp_path)
    assert all(weight.equal(start[name]) for name, weight in weights_of(engine).items())


class Notes(Silent):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def noted(self, text: str) -> None:
        self.texts.append(text)


def test_dpo_starts_at_ln_2_with_the_adapter_moved_and_dropout_on(tmp_path: Path) -> None:
    """TRAPS 40, 44: the reference is the policy with its adapter, and dropout is off where it is measured."""
    notes = Notes()
    Trial(tmp_path, dpo_stage(tuning=Lora(r=4, dropout=0.5), max_steps=1), dropout=0.5).run(notes)
    assert "step 0: the policy is its reference, loss 0.6931472 (expected 0.6931472)" in notes.texts


def test_dpo_against_another_reference_is_refused(tmp_path: Path) -> None:
    """TRAPS 40: the base's log-probs, where the policy is base and adapter."""
    trees = pair_trees()
    stage = dpo_stage()
    with pytest.raises(NumericsError, match=r"step 0: the loss before the first update is 0\.\d+, not 0\.6931472"):
        train_stage(
            engine=lora_engine(moved=True),
            stage=stage,
            objective=objective_of(stage),
            train=trees,
            references=(references_of(lora_engine(), trees), []),
            folder=StageFolder(tmp_path),
            seed=0,
            machine=MACHINE,
        )
    assert not (tmp_path / "metrics.jsonl").exists()


def test_one_row_trains(tmp_path: Path) -> None:
    """F29."""
    _train(lora_engine(), answer_trees(1), tmp_path, batch_size=16)
    assert [record["num_examples"] for record in read_records(tmp_path / "metrics.jsonl")] == [1]


def test_texts_without_a_prompt_train(tmp_path: Path) -> None:
    _train(lora_engine(), text_trees(3), tmp_path)
    # lengths 3, 17 and 2, each less its first token
    assert [record["num_trained"] for record in read_records(tmp_path / "metrics.jsonl")] == [19]


def test_the_logged_rate_is_the_applied_one(tmp_path: Path) -> None:
    """AdamW's first step moves each weight by the rate times the gradient's sign: half of 0.01 in a warm-up of two."""
    trial = Trial(tmp_path, sft_stage(epochs=1, max_steps=2, warmup_fraction=1.0, tuning=Full(), save_every=1))
    engine = trial.engine()
    start = weights_of(engine)
    trial.run(engine=engine)
    first = load_checkpoint(tmp_path / "checkpoints" / "step-1").weights
    moves = torch.cat([(first[name] - weight).abs().flatten() for name, weight in start.items()])
    moved = moves[moves > 0]
    assert moved.median().item() == pytest.approx(0.005, rel=1e-3)
    assert read_records(tmp_path / "metrics.jsonl")[0]["lr"] == 0.005


def test_evaluation_is_without_dropout(tmp_path: Path) -> None:
    """Adapter dropout 0.5: the held-out loss before the first step is that of the model in eval mode."""
    trial = Trial(tmp_path, sft_stage(max_steps=1), dropout=0.5)
    engine = trial.engine()
    engine.model.eval()
    rows = [engine.logprobs([tree]).logprob_N.detach().double() for tree in answer_trees(15)[11:]]
    engine.model.train()
    trial.run(engine=engine)
    found = read_records(tmp_path / "eval.jsonl")[0]["loss"]
    assert found == pytest.approx(-float(torch.cat(rows).mean()), rel=1e-6)
    assert engine.model.training
