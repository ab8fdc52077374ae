"""Which changes a run may go on with."""

from __future__ import annotations

import pytest

from tunesmith.recipe.diff import diff_recipes
from tunesmith.recipe.load import parse_recipe

SFT = {"name": "sft", "method": "sft", "train": [{"path": "a"}], "heldout_fraction": 0.1}
DPO = {
    "name": "dpo",
    "method": "dpo",
    "train": [{"path": "b"}],
    "schedule": "constant",
    "warmup_fraction": 0.0,
    "heldout_fraction": 0.1,
    "max_steps": 50,
}
BASE = {"name": "n", "model": {"path": "m"}, "stages": [SFT, DPO]}


def kinds(*overrides: str, base: tuple[str, ...] = ()) -> dict[str, str]:
    old, new = parse_recipe(BASE, base).recipe, parse_recipe(BASE, [*base, *overrides]).recipe
    return {change.path: change.kind for change in diff_recipes(old, new)}


def test_nothing_changed() -> None:
    assert kinds() == {}


def test_a_change_reads_as_before_and_after() -> None:
    old, new = parse_recipe(BASE).recipe, parse_recipe(BASE, ["stages.dpo.beta=0.3"]).recipe
    (change,) = diff_recipes(old, new)
    assert str(change) == "stages[1].beta: 0.1 -> 0.3"
    assert not change.safe
    assert change.why == "the steps that were taken would have been others with it"
    assert change.stage_number == 1


def test_values_read_as_a_recipe_writes_them() -> None:
    old = parse_recipe(BASE).recipe
    new = parse_recipe(BASE, ["stages.dpo.max_steps=null", "stages.sft.offload_activations=true"]).recipe
    texts = [str(change) for change in diff_recipes(old, new)]
    assert texts == ["stages[0].offload_activations: false -> true", "stages[1].max_steps: 50 -> null"]


def test_every_safe_kind_says_why() -> None:
    old, new = parse_recipe(BASE).recipe, parse_recipe(BASE, ["runs_folder=elsewhere"]).recipe
    (change,) = diff_recipes(old, new)
    assert (change.safe, change.stage_number) == (True, None)
    assert change.why == "it says where files lie, not what is in them"


@pytest.mark.parametrize(
    ("override", "path", "kind"),
    [
        ("runs_folder=elsewhere", "runs_folder", "place"),
        ("stages.sft.save_every=7", "stages[0].save_every", "cadence"),
        ("stages.sft.keep_checkpoints=9", "stages[0].keep_checkpoints", "cadence"),
        ("stages.sft.eval_every=7", "stages[0].eval_every", "cadence"),
        ("compare.num_prompts=3", "compare.num_prompts", "comparison"),
        ("threads=1", "threads", "rounding"),
        ("stages.sft.forest_tokens=512", "stages[0].forest_tokens", "rounding"),
        ("stages.sft.gradient_checkpointing=full", "stages[0].gradient_checkpointing", "rounding"),
        ("stages.sft.offload_activations=true", "stages[0].offload_activations", "rounding"),
        ("model.attention=sdpa", "model.attention", "rounding"),
        ("memory=16GB", "memory", "rounding"),
        ("stages.dpo.max_steps=80", "stages[1].max_steps", "more steps"),
        ("stages.dpo.max_steps=null", "stages[1].max_steps", "more steps"),
        ("stages.dpo.epochs=2", "stages[1].epochs", "more steps"),
        ("stages.dpo.max_steps=20", "stages[1].max_steps", "unsafe"),  # fewer
        ("stages.sft.epochs=2", "stages[0].epochs", "unsafe"),  # a cosine spans all steps
        ("name=other", "name", "unsafe"),
        ("seed=1", "seed", "unsafe"),
        ("model.path=other", "model.path", "unsafe"),
        ("stages.sft.batch_size=1", "stages[0].batch_size", "unsafe"),
        ("stages.sft.train[0].limit=1", "stages[0].train[0].limit", "unsafe"),
        ("stages.sft.tuning.r=1", "stages[0].tuning.r", "unsafe"),
    ],
)
def test_kinds(override: str, path: str, kind: str) -> None:
    assert kinds(override) == {path: kind}


def test_evaluations_choose_the_result_under_keep_best() -> None:
    base = ("stages.sft.eval_every=5", "stages.sft.keep=best")
    assert kinds("stages.sft.eval_every=7", base=base) == {"stages[0].eval_every": "unsafe"}


def test_more_steps_of_a_stage_that_others_start_from() -> None:
    base = ("stages.sft.schedule=constant", "stages.sft.warmup_fraction=0")
    assert kinds("stages.sft.epochs=2", base=base) == {"stages[0].epochs": "unsafe"}


def test_warm_up_spans_a_share_of_all_steps() -> None:
    base = ("stages.dpo.warmup_fraction=0.1",)
    assert kinds("stages.dpo.max_steps=80", base=base) == {"stages[1].max_steps": "unsafe"}


def test_another_stage_is_not_safe() -> None:
    old = parse_recipe({**BASE, "stages": [SFT]}).recipe
    new = parse_recipe(BASE).recipe
    changes = diff_recipes(old, new)
    assert changes
    assert not any(change.safe for change in changes)
    assert str(changes[0]) == "stages[1].name: (absent) -> dpo"
