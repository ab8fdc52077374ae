"""The best evaluation, patience and improvement by hand; and stages that end early, whole or broken off."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from torch.testing import assert_close

from tests.support.training import Trial, dpo_stage, sft_stage, weights_of
from tests.unit.train.test_resume import Crash
from tunesmith.errors import RecipeError
from tunesmith.recipe.best import best_rules
from tunesmith.recipe.later import settings_of
from tunesmith.recipe.models import Source
from tunesmith.recipe.stages import StageBase
from tunesmith.runs.records import read_records
from tunesmith.train.best import is_over, judged, over_line
from tunesmith.train.checkpoint import State, list_steps

START = State(0, 100, None, None, None, 1, "2", {})


def after(stage: StageBase, values: list[float], name: str = "loss") -> State:
    state = START
    for step, value in enumerate(values, start=1):
        state, _ = judged(stage, replace(state, step=step), {"step": step, name: value})
    return state


def test_the_lowest_loss_is_best_and_what_is_no_number_is_not() -> None:
    state = after(sft_stage(patience=3), [3.0, 2.0, math.nan, 2.5, 2.0])
    assert (state.best_step, state.best_loss, state.num_unimproved) == (2, 2.0, 3)
    assert is_over(sft_stage(patience=3), state)
    assert not is_over(sft_stage(patience=4), state)
    assert not is_over(sft_stage(), state)


def test_figures_that_are_to_be_high_are_best_when_high() -> None:
    stage = dpo_stage(best_metric="accuracy", patience=2)
    state = after(stage, [0.5, 0.75, 0.7, 0.75], "accuracy")
    assert (state.best_step, state.best_loss, state.num_unimproved) == (2, 0.75, 2)
    turned = after(dpo_stage(best_metric="accuracy", best_mode="min"), [0.5, 0.75, 0.7], "accuracy")
    assert (turned.best_step, turned.best_loss) == (1, 0.5)


def test_small_steps_add_up_to_an_improvement() -> None:
    stage = sft_stage(patience=2, min_improvement=0.1)
    # 1.0, then 0.94 (not enough), then 0.88: 0.12 below the last improvement
    assert after(stage, [1.0, 0.94, 0.88]).num_unimproved == 0
    state = after(stage, [1.0, 0.94, 0.92])
    assert (state.num_unimproved, state.best_step, state.best_loss) == (2, 3, 0.92)
    assert over_line(stage, state) == (
        "the stage ends at step 3 of 100: loss has not improved by more than 0.1 in 2 evaluations; "
        "the best is 0.92, at step 3"
    )


HARMFUL = {"learning_rate": 0.3, "schedule": "constant", "epochs": 20, "eval_every": 2, "save_every": 3}


def test_a_stage_ends_when_it_no_longer_improves_whole_or_broken_off(tmp_path: Path) -> None:
    stage = sft_stage(**HARMFUL, patience=2, keep="best", keep_checkpoints=1)
    outcome, engine = Trial(tmp_path / "whole", stage).run()
    losses = [record["loss"] for record in read_records(tmp_path / "whole" / "eval.jsonl")[1:]]
    last = len(read_records(tmp_path / "whole" / "metrics.jsonl"))
    assert last == 2 * len(losses) < outcome.num_steps == 60
    assert min(losses[-2:]) >= min(losses[:-2])  # type: ignore[type-var]
    assert outcome.result_step == outcome.best_step == 2 * (losses.index(outcome.best_loss) + 1)
    assert set(list_steps(tmp_path / "whole" / "checkpoints")) == {outcome.best_step, last}
    with pytest.raises(ConnectionAbortedError):
        Trial(tmp_path / "broken", stage).run(Crash(last))
    resumed, again = Trial(tmp_path / "broken", stage).run()
    assert resumed.resumed_step > 0
    for name, weight in weights_of(engine).items():
        assert_close(weights_of(again)[name], weight, rtol=0, atol=0)
    for name in ("eval.jsonl", "metrics.jsonl"):
        assert (tmp_path / "whole" / name).read_text() == (tmp_path / "broken" / name).read_text()
    third, _ = Trial(tmp_path / "broken", stage).run()  # it is over, and stays so
    assert (third.resumed_step, third.result_step) == (last, outcome.result_step)


def test_a_figure_that_evaluations_lack_is_refused_before_the_first_update(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no 'accuracy'") as error:
        Trial(tmp_path, sft_stage(keep="best", best_metric="accuracy", eval_every=2)).run()
    assert "They have: loss." in str(error.value)
    assert not read_records(tmp_path / "metrics.jsonl")


def messages(**changes: object) -> list[str]:
    stage = sft_stage(**({"heldout": [Source(path="y")], "eval_every": 2} | changes))
    return [problem.text for problem in best_rules(stage, ("stages", 0))]


def test_rules_name_what_is_missing() -> None:
    assert messages() == messages(patience=2) == messages(keep="best", best_metric="accuracy") == []
    assert "set best_mode to min or max" in messages(keep="best", best_metric="tokens_chosen")[0]
    assert messages(keep="best", best_metric="tokens_chosen", best_mode="min") == []
    assert messages(best_metric="accuracy") == ["nothing is chosen by it: set keep: best, or patience"]
    assert messages(min_improvement=0.1) == ["nothing is stopped by it: set patience"]
    assert messages(patience=1, eval_every=0) == ["it counts evaluations: set eval_every"]
    assert "needs held-out rows" in messages(patience=1, heldout=[])[0]


def test_stages_of_earlier_releases_are_known_by_the_same_settings() -> None:
    assert not {"best_metric", "best_mode", "patience", "min_improvement"} & settings_of(sft_stage()).keys()
