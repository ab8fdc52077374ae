"""What AOT's stages refuse: settings that would make another method of it, or that mean nothing there."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith.errors import RecipeError
from tunesmith.recipe.load import load_recipe

RECIPE = """\
name: demo
model: {path: base}
stages:
  - name: pairs
    method: METHOD
    train: [{path: pairs.jsonl}]
    SETTING
"""


def load(folder: Path, method: str, setting: str) -> None:
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.replace("METHOD", method).replace("SETTING", setting), encoding="utf-8")
    load_recipe(path)


@pytest.mark.parametrize("method", ["aot", "aot_unpaired"])
@pytest.mark.parametrize("setting", ["batch_size: 1", "weighting: wpo", "pair_weights: rows"])
def test_a_step_of_one_pair_and_weights_of_pairs_are_refused(tmp_path: Path, method: str, setting: str) -> None:
    with pytest.raises(RecipeError, match=rf"stages\[0\].{setting.split(':')[0]}: {method} "):
        load(tmp_path, method, setting)
    load(tmp_path, "hinge", setting)
    load(tmp_path, method, "batch_size: 2")
