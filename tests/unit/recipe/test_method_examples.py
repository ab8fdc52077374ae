"""Every example recipe of a method is one that this version takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith.recipe.load import load_recipe

EXAMPLES = sorted((Path(__file__).parents[3] / "examples" / "methods").glob("*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_it_loads_and_ends_in_the_method_of_its_name(path: Path) -> None:
    recipe = load_recipe(path).recipe
    assert path.stem.startswith(recipe.stages[-1].method)
