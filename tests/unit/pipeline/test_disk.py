from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.folders import make_run_inputs, tiny_recipe
from tunesmith.errors import ResourceError
from tunesmith.model.machine import Machine
from tunesmith.pipeline import disk
from tunesmith.recipe.models import Recipe
from tunesmith.runs.folder import RunFolder


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return Recipe.model_validate(tiny_recipe(make_run_inputs(tmp_path)))


def test_the_whole_run_is_asked_for_before_it_starts(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "free_bytes", lambda path: 1000)
    with pytest.raises(
        ResourceError, match=r"results need [\d,]+ bytes \(stage sft [\d,]+, dpo [\d,]+\), and 1,000 are free"
    ) as caught:
        disk.refuse_small_disk(recipe, Machine.cpu())
    assert caught.value.exit_code == 5
    assert "keep_checkpoints" in caught.value.remedy


def test_a_finished_stage_needs_nothing_and_what_lies_there_counts(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs: list[dict[str, int]] = []
    monkeypatch.setattr(disk, "refuse_needs", lambda found, folder: needs.append(dict(found)))
    disk.refuse_small_disk(recipe, Machine.cpu())
    run = RunFolder(tmp_path / "runs" / "tiny")
    (run.stage("dpo").create().checkpoints / "some").write_bytes(b"x" * 100)
    run.stage("sft").create().result_path.write_text("{}")
    disk.refuse_small_disk(recipe, Machine.cpu())
    assert set(needs[0]) == {"sft", "dpo"}
    assert needs[1] == {"dpo": needs[0]["dpo"] - 100}
