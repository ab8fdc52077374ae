"""Whose rows a preference stage is asked to remember, and which prompts are answered."""

from __future__ import annotations

from typing import Any

from tests.support.training import answer_trees, pair_trees
from tunesmith.pipeline.probes import probe_of, retained_rows
from tunesmith.recipe.models import Model, Recipe
from tunesmith.recipe.stages import Samples

SOURCE = [{"path": "x"}]


class Rows:
    """What is read of a prepared stage."""

    def __init__(self, count: int) -> None:
        self.heldout = answer_trees(count)


def retained(stages: list[dict[str, Any]], index: int) -> int:
    """How many rows are remembered; every stage has as many held-out rows as ten times its number."""
    recipe = Recipe.model_validate({"name": "r", "model": Model(path="m"), "stages": stages})
    prepared: Any = {stage.name: Rows(10 * number + 10) for number, stage in enumerate(recipe.stages)}
    return len(retained_rows(recipe, index, prepared))


def stage(name: str, method: str, start: str = "previous") -> dict[str, Any]:
    return {"name": name, "method": method, "train": SOURCE, "start": start}


def test_the_nearest_sft_stage_before_is_remembered() -> None:
    stages = [stage("a", "sft"), stage("b", "sft"), stage("c", "dpo"), stage("r", "reward"), stage("d", "kto")]
    assert [retained(stages, index) for index in range(5)] == [0, 0, 20, 0, 20]


def test_weights_from_elsewhere_have_nothing_to_forget() -> None:
    assert retained([stage("a", "sft"), stage("b", "dpo", "base")], 1) == 0
    assert retained([stage("a", "sft"), stage("b", "dpo", "base"), stage("c", "dpo")], 2) == 0
    assert retained([stage("a", "completion"), stage("b", "dpo")], 1) == 0


def test_at_most_64_rows() -> None:
    stages = [stage(f"s{number}", "sft") for number in range(9)] + [stage("d", "dpo")]
    assert retained(stages, 9) == 64


class Words:
    """A tokenizer, as far as it is used."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return " ".join(map(str, ids))


def test_a_probe_is_made_where_there_is_something_to_look_at() -> None:
    recipe = Recipe.model_validate({"name": "r", "model": Model(path="m"), "stages": [stage("d", "dpo")]})
    (dpo,) = recipe.stages
    words: Any = Words()
    assert probe_of(dpo, pair_trees(4), [], tokenizer=words, stop_ids=(2,)) is None
    only_rows = probe_of(dpo, pair_trees(4), answer_trees(2), tokenizer=words, stop_ids=(2,))
    assert only_rows is not None
    assert (list(only_rows.prompts), len(only_rows.retained)) == ([], 2)
    asked = dpo.model_copy(update={"samples": Samples(num_prompts=3)})
    probe = probe_of(asked, pair_trees(4), [], tokenizer=words, stop_ids=(2,))
    assert probe is not None
    assert (len(probe.prompts), probe.stop_ids, probe.decode([1, 2])) == (3, (2,), "1 2")
