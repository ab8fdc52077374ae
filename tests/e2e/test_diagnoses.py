"""Every diagnosis provoked by real training of a tiny model, and healthy runs in which all are silent.

The runs are made once and shared. What a model writes is sampled before and after each of them, from the model itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.diagnosing import (
    KEPT,
    SPLIT,
    STOP,
    VOCABULARY,
    Draw,
    Trained,
    one,
    other,
    put,
    rows,
    six,
    train,
    tree,
)
from tests.support.training import dpo_stage, lora_engine, sft_stage, weights_of
from tunesmith.data.types import Tree
from tunesmith.diagnosis.diagnose import DIAGNOSES
from tunesmith.recipe.stages import StageBase
from tunesmith.runs.records import read_records
from tunesmith.train.checkpoint import list_steps, load_checkpoint, path_of


def short_dpo(**changes: Any) -> StageBase:
    return dpo_stage(**({"batch_size": 8, "forest_tokens": 2000, "beta": 0.1} | changes))


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The healthy SFT run: it learns the short answers of one language, and that they end."""
    stage = sft_stage(epochs=3, learning_rate=1e-2, batch_size=16, eval_every=10, forest_tokens=2000)
    return train(tmp_path_factory.mktemp("sft"), stage, rows(160, 1, one), KEPT, samples=True)


@pytest.fixture(scope="module")
def dpo(taught: Trained, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Trained]:
    """Trains DPO from the taught weights, on pairs of a chosen answer against the model's own kind."""

    def run(chosen: Draw, rejected: Draw = one, **changes: Any) -> Trained:
        engine = lora_engine(moved=True)
        put(engine, taught_weights)
        return train(
            tmp_path_factory.mktemp("dpo"),
            short_dpo(**changes),
            rows(96, 3, chosen, rejected),
            rows(16, 4, chosen, rejected),
            engine=engine,
            samples=True,
        )

    taught_weights = weights_of(taught.engine)
    return run


# silent


def test_a_healthy_sft_run_is_silent(taught: Trained) -> None:
    assert taught.found == {} and taught.said == {}


def test_a_healthy_preference_run_is_silent(dpo: Callable[..., Trained]) -> None:
    """Answers in the prompts' language are preferred: held-out pairs are ranked right, and the rest stays as it was."""
    run = dpo(one, other, learning_rate=1e-3, epochs=2, eval_every=8)
    last = read_records(run.folder.eval_path)[-1]
    assert last["accuracy"] > 0.6 and last["margin"] > 0.01  # type: ignore[operator]  # numbers
    assert run.found == {} and run.said == {}


# from samples


def test_another_language_is_drift_and_forgetting_and_spends_the_kl(dpo: Callable[..., Trained]) -> None:
    run = dpo(other, learning_rate=2e-2, epochs=2, kl_budget=5.0)
    assert {"language drift", "forgetting", "KL over its budget"} <= run.found.keys()
    assert run.found["language drift"].figures["now"] < 0.3
    assert "`beta: 0.2` (now 0.1)" in run.found["KL over its budget"].remedy


def test_longer_answers_win_by_their_length(dpo: Callable[..., Trained]) -> None:
    def longer(draw: np.random.Generator) -> Sequence[int]:
        return [*draw.integers(4, SPLIT, draw.integers(3, 40)), STOP]

    run = dpo(longer, learning_rate=2e-3, epochs=4)
    found = run.found["length hacking"]
    assert found.severity == "problem" and found.figures["correlation"] > 0.5
    assert "length_desensitization" in found.remedy


def test_circles_are_repetition_without_an_end(taught: Trained, tmp_path: Path) -> None:
    engine = lora_engine(moved=True)
    put(engine, weights_of(taught.engine))
    stage = sft_stage(learning_rate=1e-2, batch_size=8, forest_tokens=2000)
    run = train(tmp_path, stage, rows(96, 3, lambda draw: [7] * 18), engine=engine, samples=True)
    assert {"repetition", "answers do not end"} <= run.found.keys()


# from the steps and the held-out rows


def containing(num: int, seed: int) -> list[Tree]:
    """The rejected answer says the chosen one's tokens three times: to be unlikely it makes them so in both."""
    found = []
    for each in rows(num, seed, lambda draw: draw.integers(4, 30, 6).tolist()):
        ids = each.branches[0].ids.tolist()
        found.append(tree(each.id, each.prompt_ids.tolist(), ids, [*ids, *ids[::-1], *ids]))
    return found


def displacing(**changes: Any) -> StageBase:
    return short_dpo(**({"learning_rate": 5e-3, "eval_every": 2, "epochs": 2} | changes))


@pytest.fixture(scope="module")
def displaced(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train(tmp_path_factory.mktemp("fallen"), displacing(), containing(64, 1), containing(16, 2))


def test_rejected_answers_that_hold_the_chosen_one_displace_it(displaced: Trained) -> None:
    found = displaced.found["likelihood displacement"]
    assert found.figures["nats_lost"] > 2 and found.figures["margin_gained"] > 0
    assert "`sft_weight: 0.2` (now 0)" in found.remedy
    assert displaced.said.keys() == {"likelihood displacement"}
    (text,) = (text for text in displaced.notes if "displacement" in text)
    assert text.startswith("WARNING step ") and "Cause: " in text and "Remedy: " in text


def test_a_few_pairs_that_say_nothing_are_learned_by_heart(tmp_path: Path) -> None:
    noise = six(4, VOCABULARY)
    stage = short_dpo(epochs=8, learning_rate=2e-2, eval_every=8, beta=0.3)
    run = train(tmp_path, stage, rows(40, 1, noise, noise), rows(24, 2, noise, noise))
    assert "overfitting" in run.found
    assert "`keep: best`" in run.found["overfitting"].remedy


def test_easy_pairs_saturate(tmp_path: Path) -> None:
    stage = short_dpo(epochs=10, learning_rate=1e-2, beta=1.0)
    run = train(tmp_path, stage, rows(24, 1, six(4, SPLIT), six(SPLIT, VOCABULARY)))
    assert run.found["saturation"].severity == "notice"


def test_equal_answers_leave_the_margin_at_zero(tmp_path: Path) -> None:
    pairs = [replace(each, branches=each.branches * 2) for each in rows(16, 1, six(4, VOCABULARY))]
    run = train(tmp_path, short_dpo(epochs=10, learning_rate=2e-3), pairs)
    assert run.found["margin stuck at zero"].cause == "the answers of the pairs are identical"
    assert "dead adapter" not in run.found  # nothing pulls, and it is not the adapter's fault


def test_a_tiny_rate_leaves_the_margin_at_zero(tmp_path: Path) -> None:
    pairs = rows(16, 1, six(4, SPLIT), six(SPLIT, VOCABULARY))
    run = train(tmp_path, short_dpo(epochs=5, learning_rate=2e-7), pairs)
    assert "learning rate is too small" in run.found["margin stuck at zero"].cause
    assert "`learning_rate: 2e-06`" in run.found["margin stuck at zero"].remedy


def test_pairs_that_contradict_each_other_leave_the_margin_at_zero(tmp_path: Path) -> None:
    pairs = rows(24, 1, six(4, VOCABULARY), six(4, VOCABULARY))
    swapped = [replace(each, id=f"{each.id}s", branches=each.branches[::-1]) for each in pairs]
    stage = short_dpo(epochs=9, learning_rate=1e-2, batch_size=16, schedule="constant")
    run = train(tmp_path, stage, [*pairs, *swapped])
    assert "contradict each other" in run.found["margin stuck at zero"].cause


def test_a_wrong_reference_is_seen_before_the_first_update(tmp_path: Path) -> None:
    """Both answers are off alike, so the loss is ln 2 and the margin 0 all the same."""
    sides = (six(4, SPLIT), six(SPLIT, VOCABULARY))
    stage = short_dpo(learning_rate=1e-3)
    run = train(tmp_path, stage, rows(16, 1, *sides), rows(8, 2, *sides), shift=0.3)
    assert run.found["reference is not the policy"].figures["logratio_chosen"] == pytest.approx(-1.8, abs=1e-4)
    assert run.said.keys() == {"reference is not the policy"}


def test_a_rate_too_high_undoes_what_was_there(tmp_path: Path) -> None:
    """Pairs that say nothing, each seen once: whatever is learned of one is wrong for the next."""
    noise = six(4, VOCABULARY)
    stage = short_dpo(batch_size=4, learning_rate=0.2, beta=1.0, warmup_fraction=0.3, schedule="constant")
    run = train(tmp_path, stage, rows(120, 1, noise, noise))
    assert "`learning_rate: 0.04`" in run.found["learning rate too high"].remedy


def test_swapped_pairs_are_spikes_of_the_gradient(tmp_path: Path) -> None:
    """Pairs that are learned soon, and one in sixteen is the other way round."""
    pairs = rows(64, 1, six(4, SPLIT), six(SPLIT, VOCABULARY))
    mixed = [replace(each, branches=each.branches[:: -1 if place % 16 == 5 else 1]) for place, each in enumerate(pairs)]
    run = train(tmp_path, short_dpo(epochs=2, learning_rate=1e-2, beta=1.0, batch_size=2), mixed)
    assert run.found["gradient spikes"].severity == "notice"


def test_a_dead_adapter(tmp_path: Path) -> None:
    """The watch has said it in training, so it is not said twice."""
    run = train(tmp_path, sft_stage(epochs=4, learning_rate=1e-30, batch_size=8), rows(24, 1, one))
    assert run.found["dead adapter"].severity == "problem"
    assert run.said == {}


# policies


def test_stop_ends_the_run_behind_a_save_and_again_until_it_may_go_on(displaced: Trained, tmp_path: Path) -> None:
    sides = containing(64, 1), containing(16, 2)
    (step,) = (line["step"] for line in read_records(displaced.folder.warnings_path))
    for _ in range(2):  # the second start takes no step
        run = train(tmp_path, displacing(on_diagnosis="stop", save_every=0), *sides)
        assert run.error is not None and run.error.exit_code == 4
        assert run.error.what.startswith("likelihood displacement: on held-out pairs")
        assert f"Step {step} of 16 is saved." in run.error.what and "`sft_weight: 0.2`" in run.error.remedy
        assert list_steps(run.folder.checkpoints)[-1] == step == len(read_records(run.folder.metrics_path))
    run = train(tmp_path, displacing(), *sides)
    assert run.outcome is not None and run.outcome.num_steps == 16
    for name in ("metrics.jsonl", "eval.jsonl", "warnings.jsonl"):
        assert (run.folder.path / name).read_bytes() == (displaced.folder.path / name).read_bytes()


def test_rollback_ends_the_stage_with_the_best_step_before(displaced: Trained, tmp_path: Path) -> None:
    """The loss is lowest where the problem is seen; the result is the evaluation before it all the same."""
    (step,) = (line["step"] for line in read_records(displaced.folder.warnings_path))
    assert isinstance(step, int)
    run = train(tmp_path, displacing(on_diagnosis="rollback", keep_checkpoints=1), containing(64, 1), containing(16, 2))
    assert run.error is None and run.outcome is not None
    assert run.outcome.result_step == step - 2
    kept = load_checkpoint(path_of(run.folder.checkpoints, step - 2)).weights
    assert all(torch.equal(tensor, kept[name]) for name, tensor in weights_of(run.engine).items())
    assert any("likelihood displacement ends the stage (`on_diagnosis: rollback`)" in text for text in run.notes)
    again = train(
        tmp_path, displacing(on_diagnosis="rollback", keep_checkpoints=1), *(containing(64, 1), containing(16, 2))
    )
    assert again.outcome is not None and again.outcome.result_step == step - 2


def test_rollback_without_a_step_to_go_back_to_stops(tmp_path: Path) -> None:
    sides = (six(4, SPLIT), six(SPLIT, VOCABULARY))
    stage = short_dpo(learning_rate=1e-3, on_diagnosis="rollback", eval_every=1)
    run = train(tmp_path, stage, rows(16, 1, *sides), rows(8, 2, *sides), shift=0.3)
    assert run.error is not None and "no evaluation before it has a checkpoint" in run.error.what
    assert "Nothing was trained yet." in run.error.what


def test_every_diagnosis_was_provoked() -> None:
    """By its name, in this file."""
    text = Path(__file__).read_text("utf-8")
    assert [name for name in DIAGNOSES if f'"{name}"' not in text] == []
