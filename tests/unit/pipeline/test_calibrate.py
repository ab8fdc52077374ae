"""`tunesmith calibrate` on a two-layer model: a probe is the stage's own training, from the same start each time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import tunesmith
import tunesmith.pipeline.calibrate as module
import tunesmith.pipeline.calibrate_bench as bench
from tests.support.folders import make_run_inputs, tiny_recipe
from tests.support.training import answer_trees
from tunesmith.errors import RecipeError
from tunesmith.pipeline.calibrate import calibrate, lines
from tunesmith.pipeline.calibrate_bench import sample
from tunesmith.pipeline.calibrate_search import Place, Probe
from tunesmith.runs.records import read_records


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run_inputs(tmp_path_factory.mktemp("inputs"))


def search_only(places: list[Place], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "coarse_places", lambda *, searches_beta: places)
    monkeypatch.setattr(module, "next_places", lambda *given, searches_beta: [])
    monkeypatch.setattr(bench, "MAX_NEW_TOKENS", 6)


def test_a_probe_is_the_stage_itself(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search_only([(2, 0), (0, 0), (0, 2)], monkeypatch)
    run = tunesmith.run(tiny_recipe(inputs))
    wanted = read_records(run / "stages/dpo/eval.jsonl")[-1]
    told: list[str] = []
    found = calibrate(tunesmith.parse_recipe(tiny_recipe(inputs)), steps=2, tell=told.append)
    (middle,) = [probe for probe in found.probes if probe.place == (0, 0)]
    assert (middle.loss, middle.accuracy) == (wanted["loss"], wanted["accuracy"])
    assert all(probe.kl is not None for probe in found.probes)
    # the stage before was not trained again, and nothing of a probe is left
    assert json.loads((run.with_name(f"{run.name}-calibrate") / "manifest.json").read_text())["reused"]["sft"]
    assert sorted(path.name for path in found.folder.iterdir()) == ["calibrate.html", "calibrate.json", "memory.json"]
    written = json.loads((found.folder / "calibrate.json").read_text())
    assert written["lines"] == lines(found)
    assert any(line.startswith("recommended: stages.dpo.learning_rate=") for line in written["lines"])
    # every probe starts where the stage starts: the order of the probes does not show in their figures
    search_only([(0, 0), (2, 0)], monkeypatch)
    again = calibrate(tunesmith.parse_recipe(tiny_recipe(inputs)), steps=2)
    assert [_figures(probe) for probe in again.probes] == [_figures(found.probes[1]), _figures(found.probes[0])]


def _figures(probe: Probe) -> tuple[object, ...]:
    return probe.place, probe.loss, probe.accuracy, probe.spread, probe.fall, probe.kl


def test_a_supervised_stage_is_searched_by_its_rate_and_loss(inputs: Path) -> None:
    found = calibrate(tunesmith.parse_recipe(tiny_recipe(inputs, name="alone")), stage="sft", steps=2)
    assert {probe.beta for probe in found.probes} == {None}
    assert found.choice.probe.loss == min(probe.loss for probe in found.probes)
    assert " beta" not in lines(found)[0]
    assert not (found.folder.parents[1] / "stages").exists()  # nothing comes before it


def test_an_unknown_stage_is_named(inputs: Path) -> None:
    with pytest.raises(RecipeError, match="no stage 'dpp'") as error:
        calibrate(tunesmith.parse_recipe(tiny_recipe(inputs)), stage="dpp")
    assert "Its stages: sft, dpo." in str(error.value)


def test_a_sample_is_drawn_by_the_seed_in_the_rows_order() -> None:
    trees = answer_trees(40)
    drawn = [tree.id for tree in sample(trees, 10, seed=3)]
    assert len(set(drawn)) == 10
    assert drawn == [tree.id for tree in trees if tree.id in drawn]
    assert drawn == [tree.id for tree in sample(trees, 10, seed=3)]
    assert drawn != [tree.id for tree in sample(trees, 10, seed=4)]
    assert sample(trees, 40, seed=3) is trees
