"""Rows that change in the middle of a stage: which steps see which rows, and that going on stays exact."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from tests.support.training import (
    MACHINE,
    answer_trees,
    dpo_stage,
    lora_engine,
    pair_trees,
    references_of,
    sft_stage,
    weights_of,
)
from tunesmith.data.types import Tree
from tunesmith.engine.engine import Engine
from tunesmith.errors import ResumeError
from tunesmith.objectives import objective_of
from tunesmith.recipe.models import DpoStage, SftStage
from tunesmith.runs.folder import StageFolder
from tunesmith.runs.records import Value
from tunesmith.train.checkpoint import path_of
from tunesmith.train.loop import StageOutcome, train_stage
from tunesmith.train.progress import Silent


class _Break(Exception):
    pass


class _Watcher(Silent):
    """Breaks the stage off at a step, and keeps what was said."""

    def __init__(self, until: int = 0) -> None:
        self.until = until
        self.said: list[str] = []

    def stepped(self, record: Mapping[str, Value], timing: Mapping[str, Value]) -> None:
        if record["step"] == self.until:
            raise _Break

    def noted(self, text: str) -> None:
        self.said.append(text)


# 8 rows in steps of 4 are 2 steps an epoch; 3 epochs are 6 steps. Saved after every step.
STAGE = sft_stage(batch_size=4, epochs=3, save_every=1, keep_checkpoints=9, learning_rate=1e-3)


def _run(
    folder: Path,
    train: Sequence[Tree],
    watcher: _Watcher | None = None,
    *,
    changed: bool = False,
    stage: SftStage | DpoStage = STAGE,
    heldout: Sequence[Tree] = (),
) -> tuple[StageOutcome, Engine]:
    engine = lora_engine(moved=True)
    pairs = isinstance(stage, DpoStage)
    outcome = train_stage(
        engine=engine,
        stage=stage,
        objective=objective_of(stage),
        train=train,
        heldout=heldout,
        references=(references_of(engine, train), references_of(engine, heldout)) if pairs else None,
        folder=StageFolder(folder),
        seed=3,
        machine=MACHINE,
        observer=watcher,
        rows_changed=changed,
    )
    return outcome, engine


def _broken_off(folder: Path, at: int, **options: object) -> list[Tree]:
    """A stage that ends before step `at` is saved, on eight rows; those rows."""
    rows = answer_trees(8)
    with pytest.raises(_Break):
        _run(folder, rows, _Watcher(at), **options)  # type: ignore[arg-type]
    return rows


def _metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_epoch_under_way_begins_again_with_the_new_rows(tmp_path: Path) -> None:
    _broken_off(tmp_path, 4)  # step 3, the first of the second epoch, is saved
    more = answer_trees(12)  # three steps an epoch now
    watcher = _Watcher()
    outcome, _ = _run(tmp_path, more, watcher, changed=True)
    assert (outcome.resumed_step, outcome.num_steps) == (3, 9)  # 3 + two epochs of 3
    epochs = [record["epoch"] for record in _metrics(tmp_path)]
    assert epochs == pytest.approx([0.5, 1, 1.5, 4 / 3, 5 / 3, 2, 7 / 3, 8 / 3, 3])
    assert any("from step 4 on, from the start of epoch 2" in line for line in watcher.said)


def test_at_the_end_of_an_epoch_nothing_is_trained_again(tmp_path: Path) -> None:
    _broken_off(tmp_path, 5)  # step 4 ends the second epoch
    outcome, _ = _run(tmp_path, answer_trees(12), changed=True)
    assert (outcome.resumed_step, outcome.num_steps) == (4, 7)


def test_a_second_break_after_the_change_is_exact(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    new = answer_trees(12)
    _broken_off(whole, 4)
    _broken_off(broken, 4)
    _, expected = _run(whole, new, changed=True)
    with pytest.raises(_Break):
        _run(broken, new, _Watcher(7), changed=True)
    watcher = _Watcher()
    outcome, found = _run(broken, new, watcher, changed=True)
    assert outcome.resumed_step == 6
    assert not any("rows have changed" in line for line in watcher.said)  # they have not changed again
    assert (whole / "metrics.jsonl").read_bytes() == (broken / "metrics.jsonl").read_bytes()
    for name, tensor in weights_of(expected).items():
        assert (weights_of(found)[name] == tensor).all()


def test_rows_may_change_twice(tmp_path: Path) -> None:
    _broken_off(tmp_path, 4)
    with pytest.raises(_Break):
        _run(tmp_path, answer_trees(12), _Watcher(8), changed=True)  # steps 4 to 6 are epoch 2, step 7 begins epoch 3
    outcome, _ = _run(tmp_path, answer_trees(4), changed=True)  # one step an epoch, one epoch is left
    assert (outcome.resumed_step, outcome.num_steps) == (7, 8)
    state = json.loads((path_of(tmp_path / "checkpoints", 8) / "state.json").read_text())
    assert state["identity"]["rows.from"] == [7, 2]


def test_without_leave_other_rows_are_refused(tmp_path: Path) -> None:
    _broken_off(tmp_path, 4)
    with pytest.raises(ResumeError, match=r"rows\.train: '8, sha256"):
        _run(tmp_path, answer_trees(12))


def test_leave_is_for_rows_alone(tmp_path: Path) -> None:
    _broken_off(tmp_path, 4)
    with pytest.raises(ResumeError, match="learning_rate"):
        _run(tmp_path, answer_trees(12), changed=True, stage=STAGE.model_copy(update={"learning_rate": 5e-3}))


def test_leave_without_a_change_changes_nothing(tmp_path: Path) -> None:
    rows = _broken_off(tmp_path / "a", 4)
    _broken_off(tmp_path / "b", 4)
    _, one = _run(tmp_path / "a", rows)
    _, two = _run(tmp_path / "b", rows, changed=True)
    assert all((weights_of(two)[name] == tensor).all() for name, tensor in weights_of(one).items())


def test_a_damaged_newest_checkpoint_moves_the_change_to_the_one_before(tmp_path: Path) -> None:
    _broken_off(tmp_path, 4)
    (path_of(tmp_path / "checkpoints", 3) / "trainable.safetensors").write_bytes(b"")
    outcome, _ = _run(tmp_path, answer_trees(12), changed=True)
    assert (outcome.resumed_step, outcome.num_steps) == (2, 8)  # step 2 ended the first epoch


def test_a_best_loss_on_other_heldout_rows_is_let_go(tmp_path: Path) -> None:
    stage = STAGE.model_copy(update={"eval_every": 1, "keep": "best", "learning_rate": 1e-9})
    trees = answer_trees(8)
    with pytest.raises(_Break):
        _run(tmp_path, trees, _Watcher(4), stage=stage, heldout=answer_trees(3)[1:])
    outcome, _ = _run(tmp_path, trees, stage=stage, heldout=answer_trees(1), changed=True)
    assert outcome.best_step is not None and outcome.best_step > 3


def test_the_reference_of_new_rows_is_scored_anew(tmp_path: Path) -> None:
    stage = dpo_stage(batch_size=4, epochs=2, save_every=1, learning_rate=1e-3)
    with pytest.raises(_Break):
        _run(tmp_path, pair_trees(8), _Watcher(2), stage=stage)
    outcome, _ = _run(tmp_path, pair_trees(7)[1:], stage=stage, changed=True)
    assert (outcome.resumed_step, outcome.num_steps) == (1, 5)
