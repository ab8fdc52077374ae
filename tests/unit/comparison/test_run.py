"""The whole comparison on a tiny model: what lands in the run folder, and what is refused."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.unit.data.build import CHATML, renderer
from tests.unit.serve.test_chat import tiny
from tunesmith.comparison.figures import FIGURES
from tunesmith.comparison.run import compare_run, load_start, reference_name, stage_names
from tunesmith.data.render import Renderer
from tunesmith.errors import ModelError, RunFolderError
from tunesmith.recipe.explain import dump_resolved
from tunesmith.recipe.load import LoadedRecipe, parse_recipe
from tunesmith.runs.folder import RunFolder, create_or_open


@dataclass
class Stage:
    name: str
    renderer: Renderer = field(default_factory=lambda: renderer(CHATML))

    def __post_init__(self) -> None:
        self.model = tiny(128)
        self.tokenizer = self.renderer.tokenizer
        self.stop_ids = self.renderer.stop_ids


def load(run: Path, stage: str | None) -> Any:
    assert stage is not None
    return Stage(stage)


def rows(path: Path, values: list[dict[str, str]]) -> dict[str, str]:
    path.write_text("".join(json.dumps(value) + "\n" for value in values), "utf-8")
    return {"path": str(path)}


def trial(tmp_path: Path, *, methods: tuple[str, ...] = ("sft", "dpo"), start: str = "previous") -> LoadedRecipe:
    asked = rows(tmp_path / "eval.jsonl", [{"question": f"q{n}?", "answer": "yes", "value": "yes"} for n in range(4)])
    pairs = rows(
        tmp_path / "pairs.jsonl", [{"prompt": f"q{n}?", "chosen": "yes", "rejected": "no way"} for n in range(3)]
    )
    stages = [{"name": name, "method": name, "train": [pairs if name == "dpo" else asked]} for name in methods]
    stages[0]["start"] = start
    compare = {
        "prompts": [asked],
        "preferences": [pairs] if "dpo" in methods else [],
        "max_new_tokens": 3,
        "bootstrap_samples": 100,
        "num_shown": 2,
        "style": {"description": "anything", "pattern": ".+"},
    }
    return parse_recipe({"name": "trial", "model": {"path": "x"}, "stages": stages, "compare": compare})


def finished(tmp_path: Path, loaded: LoadedRecipe, *stages: str) -> RunFolder:
    folder = create_or_open(tmp_path / "runs", "trial")
    folder.recipe_path.write_text(dump_resolved(loaded), "utf-8")
    for name in stages:
        folder.stage(name).create().result_path.write_text("{}", "utf-8")
    return folder


def compared(folder: RunFolder) -> tuple[dict[str, Any], str]:
    out = io.StringIO()
    path = compare_run(folder.path, console=Console(file=out, width=100), load=load)
    assert path == folder.report_path and path.is_file()
    return json.loads(folder.summary_path.read_text("utf-8")), out.getvalue()


def test_every_stage_has_every_figure(tmp_path: Path) -> None:
    folder = finished(tmp_path, trial(tmp_path), "sft", "dpo")
    summary, shown = compared(folder)
    assert list(summary["stages"]) == ["base", "sft", "dpo"]
    for figures in summary["stages"].values():
        assert figures["num_prompts"] == 4 and figures["num_pairs"] == 3
        for figure in FIGURES:
            assert {"value", "low", "high", "num", "method", "reason"} == set(figures[figure.key])
    sft = summary["stages"]["sft"]
    assert (summary["reference"], sft["preference_accuracy"]["value"], sft["kl"]["value"]) == ("sft", 0.5, 0.0)
    # the three stages are one model here, so nothing may look better or worse
    assert summary["stages"]["dpo"]["kl"]["value"] == pytest.approx(0, abs=1e-5)
    assert all(one["outcome"] == "open" for entry in summary["verdict"] for one in entry["findings"])
    lines = [json.loads(line) for line in (folder.path / "compare" / "answers.jsonl").read_text("utf-8").splitlines()]
    assert len(lines) == 4 and set(lines[0]["answers"]) == {"base", "sft", "dpo"}
    assert "Exact answers" in shown and "dpo against sft" in shown


def test_the_same_comparison_twice_gives_the_same_files(tmp_path: Path) -> None:
    folder = finished(tmp_path, trial(tmp_path), "sft", "dpo")
    compared(folder)
    files = [folder.summary_path, folder.report_path, folder.path / "compare" / "answers.jsonl"]
    before = [path.read_bytes() for path in files]
    compared(folder)
    assert [path.read_bytes() for path in files] == before


def test_a_run_of_sft_alone_is_measured_against_the_base(tmp_path: Path) -> None:
    summary, _ = compared(finished(tmp_path, trial(tmp_path, methods=("sft",)), "sft"))
    assert summary["reference"] == "base"
    figure = summary["stages"]["sft"]["preference_accuracy"]
    assert figure["value"] is None
    assert figure["reason"] == "the run has no preference stage, and `compare.preferences` is empty"


def test_a_run_of_dpo_alone_has_the_base_as_its_reference(tmp_path: Path) -> None:
    summary, _ = compared(finished(tmp_path, trial(tmp_path, methods=("dpo",)), "dpo"))
    assert list(summary["stages"]) == ["base", "dpo"]
    assert summary["stages"]["base"]["preference_accuracy"]["method"] == "exact"


def test_an_unfinished_stage_is_left_out_and_named(tmp_path: Path) -> None:
    loaded = trial(tmp_path)
    folder = finished(tmp_path, loaded, "sft")
    assert stage_names(folder, loaded.recipe) == (["base", "sft"], ["Stage 'dpo' is not finished and was left out."])


def test_a_run_without_a_finished_stage_is_refused(tmp_path: Path) -> None:
    folder = finished(tmp_path, trial(tmp_path))
    with pytest.raises(RunFolderError, match="no stage of the run is finished"):
        compare_run(folder.path, load=load)
    with pytest.raises(RunFolderError):
        compare_run(tmp_path / "nowhere", load=load)


def test_the_reference_is_where_the_last_preference_stage_started(tmp_path: Path) -> None:
    assert reference_name(trial(tmp_path).recipe) == "sft"
    assert reference_name(trial(tmp_path, methods=("sft",)).recipe) == "base"
    assert reference_name(trial(tmp_path, methods=("dpo",)).recipe) == "base"
    assert reference_name(trial(tmp_path, methods=("dpo",), start="base").recipe) == "base"
    assert reference_name(trial(tmp_path, methods=("dpo",), start="runs/old:sft").recipe) == "runs/old:sft"


def test_a_start_that_is_gone_says_so(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is gone"):
        load_start(str(tmp_path / "gone"), trial(tmp_path).recipe)
