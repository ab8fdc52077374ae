"""`key=value`: dotted and indexed paths, stages by name, values in YAML 1.2."""

from __future__ import annotations

import pytest

from tunesmith.errors import RecipeError
from tunesmith.recipe.load import LoadedRecipe, parse_recipe
from tunesmith.recipe.overrides import parse_override
from tunesmith.recipe.yaml12 import KeyPath, Value


def with_overrides(*overrides: str) -> LoadedRecipe:
    stages = [
        {"name": "sft", "method": "sft", "train": [{"path": "a"}, {"path": "b"}]},
        {"name": "dpo", "method": "dpo", "train": [{"path": "c"}]},
    ]
    return parse_recipe({"name": "n", "model": {"path": "m"}, "stages": stages}, overrides)


@pytest.mark.parametrize(
    ("text", "keys", "value"),
    [
        ("seed=3", ("seed",), 3),
        ("stages.dpo.beta=1e-4", ("stages", "dpo", "beta"), 1e-4),
        ("stages[1].train[0].path=a=b", ("stages", 1, "train", 0, "path"), "a=b"),
        ("stages.my-stage.name=no", ("stages", "my-stage", "name"), "no"),
        ("model.revision=", ("model", "revision"), None),
        ("x=[a, 2]", ("x",), ["a", 2]),
        ('name="3"', ("name",), "3"),
    ],
)
def test_parse(text: str, keys: KeyPath, value: Value) -> None:
    override = parse_override(text)
    assert (override.keys, override.value) == (keys, value)


def test_a_stage_by_name_and_by_number() -> None:
    assert with_overrides("stages.dpo.beta=0.3").recipe.stages[1].model_dump()["beta"] == 0.3
    assert with_overrides("stages[1].beta=0.3").recipe.stages[1].model_dump()["beta"] == 0.3


def test_a_list_item() -> None:
    assert with_overrides("stages.sft.train[1].path=z").recipe.stages[0].train[1].path == "z"


def test_a_mapping_is_made_where_there_is_none() -> None:
    loaded = with_overrides("stages.dpo.tuning.r=8", "compare.num_prompts=5")
    assert loaded.recipe.stages[1].model_dump()["tuning"]["r"] == 8
    assert loaded.recipe.compare.num_prompts == 5


def test_the_last_override_wins() -> None:
    assert with_overrides("seed=1", "seed=2").recipe.seed == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "seed",
            "override seed: not of the form key=value\n  Examples: seed=3, stages.dpo.beta=0.3, stages[0].epochs=2",
        ),
        ("=3", "override =3: not of the form key=value\n  Examples: seed=3, stages.dpo.beta=0.3, stages[0].epochs=2"),
        (
            "a..b=3",
            "override a..b=3: not of the form key=value\n  Examples: seed=3, stages.dpo.beta=0.3, stages[0].epochs=2",
        ),
        ("sed=3", "override sed=3: sed: unknown key 'sed'; did you mean 'seed'?"),
        ("seed=abc", "override seed=abc: seed: must be a whole number, not 'abc'"),
        (
            "stages.dpo.betta=3",
            "override stages.dpo.betta=3: stages[1].betta: unknown key 'betta'; did you mean 'beta'?",
        ),
        ("stages.dpoo.beta=3", "override stages.dpoo.beta=3: stages has no 'dpoo'; did you mean 'dpo'?"),
        ("stages.kto.beta=3", "override stages.kto.beta=3: stages has no 'kto'; it has sft, dpo"),
        ("stages[2].beta=3", "override stages[2].beta=3: stages has 2 items; [2] is not one of them"),
        (
            "stages.sft.train.path=x",
            "override stages.sft.train.path=x: stages[0].train is a list: "
            "name an item by its number, as in stages[0].train[0]",
        ),
        ("model.path.x=3", "override model.path.x=3: model.path is 'm' and has nothing below it"),
        ("model[0]=3", "override model[0]=3: model is no list, so it has no item [0]"),
        ("model=m", "override model=m: model: must be a mapping, not 'm'"),
        (
            "stages.sft.replay.examples_per_step=3",
            "override stages.sft.replay.examples_per_step=3: stages[0].replay.sources: this key is required",
        ),
        (
            "seed=*x",
            "override seed=*x: *x: anchors and aliases are refused\n  Write the value out.",
        ),
        (
            "seed=[1",
            "override seed=[1: not YAML: while parsing a flow sequence expected ',' or ']', but got '<stream end>'",
        ),
    ],
)
def test_refusals(text: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        with_overrides(text)
    assert str(caught.value) == message
