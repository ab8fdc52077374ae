"""A live reference: scored as a model of its own would be, moved by its rule and by nothing else, resumed bitwise."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tests.support.training import MACHINE, Trial, dpo_stage, lora_engine, pair_trees, references_of, weights_of
from tests.unit.train.test_carried import Break
from tunesmith.engine.engine import Engine
from tunesmith.errors import ResumeError
from tunesmith.objectives import objective_of
from tunesmith.objectives.live import PREFIX
from tunesmith.recipe.models import Full, Lora
from tunesmith.recipe.preferences import DpoStage, ReferenceUpdate
from tunesmith.recipe.stages import StageBase
from tunesmith.runs.folder import StageFolder
from tunesmith.runs.records import read_records
from tunesmith.train.checkpoint import OBJECTIVE, OPTIMIZER, STATE, WEIGHTS, Checkpoint, load_checkpoint
from tunesmith.train.live import exchanged
from tunesmith.train.loop import train_stage
from tunesmith.train.step import Batch, judge, score

EVERY, STEPS = 2, 5
FILES = ("metrics.jsonl", "eval.jsonl", *(f"checkpoints/step-{STEPS}/{name}" for name in (WEIGHTS, OPTIMIZER, STATE)))


def stage_with(**changes: object) -> DpoStage:
    """Five steps of all eight rows, saved after each; dropout is on, and must not reach the reference."""
    update = ReferenceUpdate(mode="soft", alpha=0.6, every=EVERY)
    values: dict[str, object] = {
        "reference_update": update,
        "epochs": STEPS,
        "batch_size": 8,
        "save_every": 1,
        "keep_checkpoints": 9,
        "eval_every": 1,
        "tuning": Lora(r=4, dropout=0.2),
        "forest_tokens": 150,
    }
    return dpo_stage(**(values | changes))


def run(folder: Path, stage: StageBase, *, break_after: int = 0, dropout: float = 0.2) -> Engine:
    engine = lora_engine(dropout=dropout, moved=True)
    trees = pair_trees(12)
    train_stage(
        engine=engine,
        stage=stage,
        objective=objective_of(stage),
        train=trees[:8],
        heldout=trees[8:],
        references=(references_of(engine, trees[:8]), references_of(engine, trees[8:])),
        folder=StageFolder(folder),
        seed=3,
        machine=MACHINE,
        observer=Break(break_after),
    )
    return engine


def reference_in(checkpoint: Checkpoint) -> dict[str, Tensor]:
    return {name.removeprefix(PREFIX): each for name, each in checkpoint.state.tensors.items()}


def loss_under(policy: Mapping[str, Tensor], reference: Mapping[str, Tensor], stage: StageBase) -> float:
    """The loss of the held-out rows with two models of their own, both without dropout."""
    engines = []
    for weights in (policy, reference):
        engine = lora_engine()
        with torch.no_grad():
            for name, parameter in engine.model.named_parameters():
                if name in weights:
                    parameter.copy_(weights[name])
        engines.append(engine)
    trees = pair_trees(12)[8:]
    logprob_N = score(engines[0], Batch(trees), forest_tokens=10_000, machine=MACHINE)
    batch = Batch(trees, references_of(engines[1], trees))
    return judge(batch, logprob_N, objective_of(stage)).loss.mean()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    run(folder, stage_with())
    return folder


def test_the_reference_is_what_the_papers_rule_makes_of_the_saved_weights(whole: Path) -> None:
    expected = weights_of(lora_engine(moved=True))
    for step in range(1, STEPS + 1):
        saved = load_checkpoint(whole / f"checkpoints/step-{step}")
        if step % EVERY == 0:
            expected = {name: 0.6 * saved.weights[name] + 0.4 * old for name, old in expected.items()}
        found = reference_in(saved)
        assert found.keys() == saved.weights.keys()
        for name, tensor in expected.items():
            assert_close(found[name], tensor, rtol=1e-6, atol=1e-7)
        assert saved.state.carried["reference_moves"] == step // EVERY
        assert not any(each.requires_grad for each in found.values())


def test_evaluations_see_the_reference_as_it_was_at_their_step(whole: Path) -> None:
    """A step moves the reference, and the evaluation behind it is already against the new one."""
    records = read_records(whole / "eval.jsonl")
    assert [record["step"] for record in records] == list(range(STEPS + 1))
    for record in records[1:]:
        saved = load_checkpoint(whole / f"checkpoints/step-{record['step']}")
        expected = loss_under(saved.weights, reference_in(saved), stage_with())
        assert record["loss"] == pytest.approx(expected, abs=2e-6)
    fixed = weights_of(lora_engine(moved=True))
    saved = load_checkpoint(whole / f"checkpoints/step-{STEPS}")
    assert abs(loss_under(saved.weights, fixed, stage_with()) - float(str(records[-1]["loss"]))) > 1e-3


def test_a_step_behind_a_hard_update_starts_at_ln_2(tmp_path: Path) -> None:
    """The whole data in a step, no dropout: behind each update the policy is its reference again."""
    stage = stage_with(reference_update=ReferenceUpdate(mode="hard", every=2), tuning=Lora(r=4), epochs=6, batch_size=8)
    run(tmp_path, stage, dropout=0.0)
    losses = [float(str(record["loss"])) for record in read_records(tmp_path / "metrics.jsonl")]
    for number, loss in enumerate(losses):
        assert (loss == pytest.approx(0.6931472, abs=1e-6)) == (number % 2 == 0), losses


def test_it_goes_on_bit_by_bit(whole: Path, tmp_path: Path) -> None:
    for step in (2, 3):  # right behind a move, and between two
        with pytest.raises(ConnectionAbortedError):
            run(tmp_path, stage_with(), break_after=step)
    run(tmp_path, stage_with())
    for name in (*FILES, f"checkpoints/step-{STEPS}/{OBJECTIVE}"):
        assert (whole / name).read_bytes() == (tmp_path / name).read_bytes(), name


def test_splits_change_rounding_only(whole: Path, tmp_path: Path) -> None:
    """Also where no tree fits a forest beside another. Without dropout, which is drawn forest by forest."""
    plain = stage_with(tuning=Lora(r=4))
    run(tmp_path / "a", plain, dropout=0.0)
    run(tmp_path / "b", plain.model_copy(update={"forest_tokens": 1}), dropout=0.0)
    for one, two in zip(*(read_records(tmp_path / name / "metrics.jsonl") for name in "ab"), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)


def test_all_weights_can_be_followed(tmp_path: Path) -> None:
    stage = stage_with(tuning=Full(), learning_rate=1e-4, epochs=3, batch_size=4, max_steps=3)
    outcome, engine = Trial(tmp_path, stage).run()
    saved = load_checkpoint(tmp_path / "checkpoints/step-3")
    assert outcome.num_steps == 3
    assert reference_in(saved).keys() == weights_of(engine).keys()


def test_weights_change_places_and_come_back_whatever_happens() -> None:
    engine = lora_engine(moved=True)
    trainable = {name: each for name, each in engine.model.named_parameters() if each.requires_grad}
    before, others = weights_of(engine), {name: torch.full_like(each, 2.0) for name, each in trainable.items()}
    with pytest.raises(KeyError), exchanged(trainable, others):
        assert all(bool((each == 2.0).all()) for each in trainable.values())
        assert all(others[name].equal(each) for name, each in before.items())
        raise KeyError
    assert all(weight.equal(before[name]) for name, weight in weights_of(engine).items())
    assert all(bool((each == 2.0).all()) for each in others.values())


def test_a_checkpoint_of_a_fixed_reference_does_not_go_on_with_a_live_one(tmp_path: Path) -> None:
    with pytest.raises(ConnectionAbortedError):
        run(tmp_path, stage_with(reference_update=None), break_after=3)
    with pytest.raises(ResumeError):
        run(tmp_path, stage_with())
