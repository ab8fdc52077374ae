"""Embedded files, shipped recipes and optional packages: found, or refused with what to do."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tunesmith.errors import MissingExtraError, RecipeError
from tunesmith.recipe import resources
from tunesmith.recipe.extras import need_extra
from tunesmith.recipe.resources import embedded, find_recipe, package_folder, shipped_recipes


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "embedded" / "quickstart"
    folder.mkdir(parents=True)
    (folder / "sft.jsonl.gz").write_bytes(b"x")
    (tmp_path / "secret").write_bytes(b"x")
    monkeypatch.setattr(resources, "package_folder", lambda: tmp_path)
    return tmp_path


def test_other_paths_are_not_embedded() -> None:
    assert embedded("data/x.jsonl") is None


def test_an_embedded_file_and_folder(package: Path) -> None:
    assert embedded("embedded:quickstart/sft.jsonl.gz") == package / "embedded/quickstart/sft.jsonl.gz"
    assert embedded("embedded:quickstart") == package / "embedded/quickstart"


@pytest.mark.parametrize("path", ["embedded:../secret", "embedded:quickstart/../../secret", "embedded:/etc/passwd"])
def test_paths_that_leave_the_package(package: Path, path: str) -> None:
    with pytest.raises(RecipeError) as caught:
        embedded(path)
    assert str(caught.value) == f"{path}: an embedded path names a file inside the package, without `..`"


def test_a_missing_embedded_file_names_the_nearest(package: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        embedded("embedded:quickstart/stf.jsonl.gz")
    assert str(caught.value) == (
        "embedded:quickstart/stf.jsonl.gz: no such embedded file; did you mean 'quickstart/sft.jsonl.gz'?\n"
        "  Embedded are: quickstart/sft.jsonl.gz"
    )


def test_the_package_folder_holds_this_module() -> None:
    assert (package_folder() / "recipe" / "resources.py").samefile(resources.__file__)


def test_shipped_recipes_are_found_by_name() -> None:
    assert find_recipe("dpo-mix-7k") == shipped_recipes()["dpo-mix-7k"]


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(RecipeError) as caught:
        find_recipe("dpo-mix7k")
    lines = str(caught.value).splitlines()
    assert lines[0] == "dpo-mix7k: no such file, and no shipped recipe of that name; did you mean 'dpo-mix-7k'?"
    assert lines[1].startswith("  Give a recipe file, or one of the shipped recipes: dpo-mix-7k, ")


def test_an_installed_package() -> None:
    assert need_extra("json", "gpu") is sys.modules["json"]


def test_a_missing_extra_names_the_command() -> None:
    with pytest.raises(MissingExtraError) as caught:
        need_extra("tunesmith_no_such_module", "gpu")
    assert str(caught.value) == (
        "this needs the package tunesmith_no_such_module, which is not installed\n"
        '  Install it with: pip install "tunesmith[gpu]"'
    )


def test_an_error_inside_an_extra_stays_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_extra.py").write_text("import tunesmith_no_such_module\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="tunesmith_no_such_module"):
        need_extra("broken_extra", "gpu")
