"""Which commit of a model a run takes: the one that it began on, as long as the recipe asks for the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith.errors import ModelError, ResumeError
from tunesmith.pipeline import pins
from tunesmith.pipeline.pins import pin_entry, pinned
from tunesmith.recipe.explain import dump_resolved
from tunesmith.recipe.load import LoadedRecipe, load_recipe, parse_recipe
from tunesmith.recipe.models import Model

OLD, NEW = "a" * 40, "b" * 40
STAGE = {"name": "sft", "method": "sft", "train": [{"path": "a.jsonl"}]}


def recipe(path: str = "org/model", revision: str | None = None) -> LoadedRecipe:
    return parse_recipe({"name": "n", "model": {"path": path, "revision": revision}, "stages": [STAGE]})


@pytest.fixture
def main_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str | None, str]:
    """A hub by hand: commits by the revision that is asked for; what is not here cannot be had."""
    commits: dict[str | None, str] = {None: OLD, "v1": OLD, OLD: OLD}

    def folder(model: Model) -> Path:
        if model.revision not in commits:
            raise ModelError("no such revision")
        return tmp_path / commits[model.revision]

    monkeypatch.setattr(pins, "model_folder", folder)
    monkeypatch.setattr(pins, "hub_commit", lambda path: path.name)
    return commits


def test_the_newest_commit_is_written_down_and_kept(main_is: dict[str | None, str], tmp_path: Path) -> None:
    first = pinned(recipe(), {})
    assert first.recipe.model.revision == OLD
    manifest = pin_entry(recipe(), first, {})
    assert manifest == {"model_revision": {"path": "org/model", "asked": None, "commit": OLD}}
    main_is |= {None: NEW, NEW: NEW}
    again = pinned(recipe(), manifest)
    assert again.recipe.model.revision == OLD
    assert pin_entry(recipe(), again, manifest) == manifest
    (tmp_path / "recipe.yaml").write_text(dump_resolved(again))
    assert "# the commit of the newest when the run began" in dump_resolved(again)
    assert pinned(load_recipe(tmp_path / "recipe.yaml"), manifest).recipe.model.revision == OLD
    assert pinned(recipe(), {}).recipe.model.revision == NEW  # another run


def test_a_branch_is_as_movable_as_the_newest(main_is: dict[str | None, str]) -> None:
    manifest = pin_entry(recipe(revision="v1"), pinned(recipe(revision="v1"), {}), {})
    main_is["v1"] = NEW
    assert pinned(recipe(revision="v1"), manifest).recipe.model.revision == OLD


def test_another_revision_is_not_the_one_that_was_begun_on(main_is: dict[str | None, str]) -> None:
    manifest = pin_entry(recipe(), pinned(recipe(), {}), {})
    main_is["v2"] = NEW
    assert pinned(recipe(revision="v2"), manifest).recipe.model.revision == NEW  # which the diff of recipes refuses
    assert pinned(recipe(revision=NEW), manifest).recipe.model.revision == NEW


def test_a_lost_commit_ends_the_run(main_is: dict[str | None, str]) -> None:
    manifest = pin_entry(recipe(), pinned(recipe(), {}), {})
    main_is.clear()
    main_is[None] = NEW
    with pytest.raises(ResumeError, match=f"began on commit {OLD}"):
        pinned(recipe(), manifest)


def test_a_folder_has_no_commit(main_is: dict[str | None, str], tmp_path: Path) -> None:
    given = recipe(str(tmp_path))
    assert pinned(given, {}) is given
    assert pin_entry(given, given, {}) == {}
    assert pinned(recipe("embedded:quickstart/model"), {}).recipe.model.revision is None


@pytest.mark.parametrize("entry", ["x", {}, {"path": "org/model", "asked": None, "commit": "main"}, {"commit": 3}])
def test_a_strange_manifest_pins_nothing(main_is: dict[str | None, str], entry: object) -> None:
    assert pinned(recipe(), {"model_revision": entry}).recipe.model.revision == OLD
