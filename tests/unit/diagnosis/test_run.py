"""A run folder is diagnosed from its files: by the command, by the report, and while it trains."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.unit.comparison.build import hostile_report
from tunesmith.cli.diagnose import diagnose as command
from tunesmith.comparison.report import report_html
from tunesmith.diagnosis.base import Settings
from tunesmith.diagnosis.diagnose import read_run
from tunesmith.errors import RecipeError, RunFolderError
from tunesmith.recipe.load import parse_recipe
from tunesmith.runs.atomic import write_text
from tunesmith.runs.folder import RunFolder, StageFolder, create_or_open
from tunesmith.runs.records import Record, append_record, read_records
from tunesmith.train.diagnosing import Diagnosing
from tunesmith.train.progress import Silent
from tunesmith.train.watch import Watch, start_watch

RECIPE = """
name: trial
model: {path: "embedded:quickstart/model"}
stages:
  - {name: sft, method: sft, train: [{path: a.jsonl}]}
  - {name: dpo, method: dpo, train: [{path: b.jsonl}], beta: 0.3}
"""
SFT = Settings("sft", 2e-4)


def step_record(step: int, loss: float = 1.0) -> Record:
    return {"step": step, "loss": loss, "lr": 2e-4, "grad_norm": 1.0}


def run_of(path: Path) -> RunFolder:
    """A run whose DPO stage spends its KL, and whose SFT stage is healthy but was not always."""
    run = create_or_open(path, "trial")
    write_text(run.recipe_path, RECIPE)
    sft, dpo = run.stage("sft").create(), run.stage("dpo").create()
    append_record(sft.metrics_path, step_record(1))
    early: Record = {"step": 20, "kind": "learning rate too high", "severity": "problem", "text": "rate: 5 nats"}
    append_record(sft.warnings_path, early)
    append_record(sft.warnings_path, {"step": 7, "kind": "loss spike", "text": "the loss is 30", "causes": ["rows"]})
    append_record(dpo.metrics_path, step_record(30))
    append_record(dpo.eval_path, {"step": 30, "loss": 0.5, "sample_kl": 25.0})
    return run


def test_the_command_names_evidence_cause_and_remedy(tmp_path: Path) -> None:
    shown = CliRunner().invoke(command, [str(run_of(tmp_path).path)])
    assert shown.exit_code == 0, shown.output
    lines = shown.output.splitlines()
    assert lines[0] == "sft: sft, 1 steps; nothing found"
    assert "    step 20: rate: 5 nats" in lines and "    step 7: the loss is 30" in lines
    assert "dpo: dpo, 30 steps; 1 problem" in lines
    assert "  PROBLEM: KL over its budget (step 30)" in lines
    text = " ".join(shown.output.split())
    assert "evidence at step 30 sampled answers are 25 nats an answer from the starting policy" in text
    assert "remedy Set `beta: 0.6` (now 0.3) or `learning_rate: 2.5e-06` (now 5e-06)" in text
    assert max(len(line) for line in lines) <= 110


def test_the_same_as_json_and_of_one_stage(tmp_path: Path) -> None:
    shown = CliRunner().invoke(command, [str(run_of(tmp_path).path), "--json", "--stage", "dpo"])
    (stage,) = json.loads(shown.output)["stages"]
    assert (stage["stage"], stage["num_steps"]) == ("dpo", 30)
    (found,) = stage["diagnoses"]
    assert (found["name"], found["severity"]) == ("KL over its budget", "problem")
    assert found["figures"] == {"kl": 25.0, "budget": 10.0}


def test_what_is_no_run_and_what_is_no_stage(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="no manifest"):
        read_run(tmp_path)
    with pytest.raises(RunFolderError, match="there is no stage 'dop'"):
        read_run(run_of(tmp_path).path, "dop")


def test_a_stage_that_has_not_begun_is_left_out(tmp_path: Path) -> None:
    run = create_or_open(tmp_path, "new")
    write_text(run.recipe_path, RECIPE)
    assert read_run(run.path) == []
    assert CliRunner().invoke(command, [str(run.path)]).output == "No stage of the run has begun.\n"


def test_the_report_has_them_as_text(tmp_path: Path) -> None:
    folder, trial, summary, answers = hostile_report(tmp_path)
    stage = folder.stage("dpo").create()
    append_record(stage.eval_path, {"step": 0, "loss": 0.7, "sample_kl": 0.0})
    append_record(stage.eval_path, {"step": 30, "loss": 0.5, "sample_kl": 25.0})
    line: Record = {"step": 3, "kind": "repetition", "severity": "problem", "text": "<i>again</i>", "causes": ["c"]}
    append_record(stage.warnings_path, line)
    html = report_html(folder, trial, summary, answers)
    assert 'id="diagnoses"' in html and 'href="#diagnoses"' in html
    assert "25 nats an answer from the starting policy" in html and "<code>kl_budget: 38</code>" in html
    assert "Step 3: &lt;i&gt;again&lt;/i&gt;." in html
    assert html.count("again&lt;") == 1  # not under the curves as well


@dataclass
class Listener(Silent):
    texts: list[str] = field(default_factory=list)

    def noted(self, text: str) -> None:
        self.texts.append(text)


def watch_of(path: Path) -> tuple[Watch, Listener]:
    listener = Listener()
    folder = StageFolder(path).create()
    watch = start_watch(folder, trainable={}, observer=listener, writes=True, diagnosing=Diagnosing(SFT))
    return watch, listener


def records_of(num: int) -> list[Record]:
    """A loss that steps up by a third: no spike, no rise of a nat, and 0.3 above its start from step 26 on."""
    return [step_record(step, 1.0 if step <= 10 else 1.3) for step in range(1, num + 1)]


def test_in_training_a_diagnosis_is_said_once_at_every_tenth_step(tmp_path: Path) -> None:
    watch, listener = watch_of(tmp_path)
    for record in records_of(60):
        watch.stepped(record, [], is_last=False)
    (line,) = read_records(tmp_path / "warnings.jsonl")
    assert (line["step"], line["kind"], line["severity"]) == (30, "learning rate too high", "problem")
    assert "`learning_rate: 4e-05`" in str(line["remedy"])
    assert len(listener.texts) == 1 and listener.texts[0].startswith(
        "WARNING step 30: learning rate too high: the mean"
    )


@pytest.mark.parametrize("stop", [25, 30, 33, 40])
def test_resumed_at_any_step_the_same_is_found_and_said(tmp_path: Path, stop: int) -> None:
    records = records_of(50)
    watches = {}
    for name, last in (("whole", 50), ("broken", 45)):
        watches[name], _ = watch_of(tmp_path / name)
        for record in records[:last]:
            append_record(tmp_path / name / "metrics.jsonl", record)
            watches[name].stepped(record, [], is_last=False)
    kept = [json.dumps(record) + "\n" for record in records[:stop]]  # as the resume of the records leaves it
    (tmp_path / "broken" / "metrics.jsonl").write_text("".join(kept))
    again, _ = watch_of(tmp_path / "broken")
    again.resume(stop)
    assert again.diagnosing is not None
    assert (again.diagnosing.problem is not None) == (stop in (30, 40))  # an unbroken run looks there only
    for record in records[stop:]:
        again.stepped(record, [], is_last=False)
    whole = (tmp_path / "whole" / "warnings.jsonl").read_bytes()
    assert (tmp_path / "broken" / "warnings.jsonl").read_bytes() == whole != b""


def test_a_rollback_needs_evaluations() -> None:
    stage = {"name": "sft", "method": "sft", "train": [{"path": "a.jsonl"}], "on_diagnosis": "rollback"}
    values = {"name": "trial", "model": {"path": "embedded:quickstart/model"}, "stages": [stage]}
    with pytest.raises(RecipeError, match="'rollback' needs a best step to go back to"):
        parse_recipe(values)
