"""A reward model end to end: trained behind SFT, saved, read again in a fresh process and by plain peft, and asked."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import tunesmith
from tests.support.folders import make_run_inputs, tiny_recipe
from tunesmith.comparison.run import reference_name, stage_names
from tunesmith.errors import DataError, ModelError, RecipeError, RunFolderError
from tunesmith.model.policy import policy_for_reading
from tunesmith.model.stage import load_stage
from tunesmith.pipeline.score import ScoreOptions, score_file
from tunesmith.pipeline.starts import start_weights
from tunesmith.recipe.load import parse_recipe
from tunesmith.runs.folder import RunFolder


def recipe_of(inputs: Path, **changes: object) -> dict[str, object]:
    """SFT, a reward model, and DPO behind it."""
    recipe = tiny_recipe(inputs, name="rm")
    stages = recipe["stages"]
    assert isinstance(stages, list)
    sft, dpo = stages
    rm = {**dpo, "name": "rm", "method": "reward", "learning_rate": 2e-2, "epochs": 6, **changes}
    recipe["stages"] = [sft, rm, dpo]
    return recipe


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run_inputs(tmp_path_factory.mktemp("reward"))


@pytest.fixture(scope="module")
def run(inputs: Path) -> Path:
    return tunesmith.run(recipe_of(inputs))


def records(run: Path, name: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "stages/rm" / name).read_text().splitlines()]


def test_it_learns_and_says_how_well_it_is_calibrated(run: Path) -> None:
    first, *_, last = records(run, "eval.jsonl")
    assert last["loss"] < first["loss"]
    assert last["accuracy"] == 1.0
    assert {"brier", "calibration_error", "confidence_90", "accuracy_90", "share_90"} <= last.keys()
    assert "calibration_error" not in records(run, "metrics.jsonl")[0]


def test_the_stage_behind_it_starts_from_the_policy_before_it(run: Path, inputs: Path) -> None:
    recipe = parse_recipe(recipe_of(inputs), ()).recipe
    assert start_weights(recipe, 2, RunFolder(run)).adapter == run / "stages/sft/adapter"
    assert stage_names(RunFolder(run), recipe) == (["base", "sft", "dpo"], [])
    assert reference_name(recipe) == "sft"


def test_the_policys_adapter_is_taken_over_and_the_head_is_new(run: Path) -> None:
    sft = load_file(run / "stages/sft/adapter/adapter_model.safetensors")
    rm = load_file(run / "stages/rm/adapter/adapter_model.safetensors")
    assert set(rm) - set(sft) == {"base_model.model.score.weight"}
    assert not any(torch.equal(rm[name], sft[name]) for name in sft)  # trained on


def test_asking_it_for_answers_is_refused_with_a_remedy(run: Path, inputs: Path) -> None:
    with pytest.raises(RunFolderError, match="tunesmith score"):
        load_stage(run, "rm")
    assert load_stage(run).name == "dpo"
    with pytest.raises(RunFolderError, match="Name one of: rm"):
        load_stage(run, "sft", scores=True)
    recipe = tiny_recipe(inputs)
    stages = recipe["stages"]
    assert isinstance(stages, list)
    for name, start in (("stage", f"{run}:rm"), ("adapter", str(run / "stages/rm/adapter"))):
        recipe["stages"] = [{**stages[1], "start": start}]
        with pytest.raises((RunFolderError, ModelError, RecipeError), match="reward model"):
            tunesmith.run(recipe | {"name": name})


def test_a_fresh_process_gives_the_same_scores_bit_for_bit(run: Path, inputs: Path, tmp_path: Path) -> None:
    report = score_file(f"{run}:rm", inputs / "pairs.jsonl", tmp_path / "here.jsonl")
    assert report.num_written == 8
    assert report.accuracy == 1.0
    code = "from tunesmith.cli.main import main; main()"
    words = ["score", str(run), str(inputs / "pairs.jsonl"), "--out", str(tmp_path / "there.jsonl")]
    subprocess.run([sys.executable, "-c", code, *words], check=True, capture_output=True)
    assert (tmp_path / "there.jsonl").read_bytes() == (tmp_path / "here.jsonl").read_bytes()
    row = json.loads((tmp_path / "here.jsonl").read_text().splitlines()[0])
    assert row["prompt"] == "Say 0."
    assert row["score"] == row["chosen_score"] - row["rejected_score"] > 0


def test_plain_peft_gives_the_same_scores(run: Path, inputs: Path, tmp_path: Path) -> None:
    score_file(str(run), inputs / "pairs.jsonl", tmp_path / "scores.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(run / "stages/rm/adapter")
    base = AutoModelForSequenceClassification.from_pretrained(inputs / "model", num_labels=1)
    model = PeftModel.from_pretrained(base, str(run / "stages/rm/adapter")).eval()
    model.config.pad_token_id = base.config.pad_token_id = tokenizer.pad_token_id
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["chosen"]}],
            tokenize=False,
        ).rstrip("\n")
        for row in rows
    ]
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    with torch.no_grad():
        found = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
    assert found.tolist() == pytest.approx([row["chosen_score"] for row in rows], abs=1e-5)


def test_a_lost_head_is_an_error(run: Path, tmp_path: Path) -> None:
    """TRAPS 52: never a fresh random one."""
    stage = load_stage(run, "rm", scores=True)
    folder = tmp_path / "adapter"
    shutil.copytree(run / "stages/rm/adapter", folder)
    weights = load_file(folder / "adapter_model.safetensors")
    del weights["base_model.model.score.weight"]
    save_file(weights, folder / "adapter_model.safetensors")
    start = stage.policy.weights
    with pytest.raises(ModelError, match="1 tensors are missing"):
        policy_for_reading(type(start)(start.full, folder), device=torch.device("cpu"), scores=True)
    with pytest.raises(ModelError, match=r"score\.weight"):
        policy_for_reading(type(start)(start.full), device=torch.device("cpu"), scores=True)
    with pytest.raises(ModelError, match="no head"):
        policy_for_reading(type(start)(start.full, run / "stages/sft/adapter"), device=torch.device("cpu"), scores=True)


def test_every_weight_trained_is_saved_whole_and_goes_on(inputs: Path, tmp_path: Path) -> None:
    recipe = recipe_of(inputs, tuning={"kind": "full"}, learning_rate=1e-3) | {"name": "full"}
    stages = recipe["stages"]
    assert isinstance(stages, list)
    run = tunesmith.run(recipe | {"stages": stages[:2]})
    score_file(str(run), inputs / "pairs.jsonl", tmp_path / "a.jsonl")
    model = AutoModelForSequenceClassification.from_pretrained(run / "stages/rm/model")
    assert model.config.num_labels == 1
    again = {**stages[1], "start": f"{run}:rm", "learning_rate": 1e-9, "epochs": 1}
    score_file(
        str(tunesmith.run(recipe | {"name": "more", "stages": [again]})), inputs / "pairs.jsonl", tmp_path / "b.jsonl"
    )
    scores = [
        [json.loads(line)["score"] for line in (tmp_path / n).read_text().splitlines()] for n in ("a.jsonl", "b.jsonl")
    ]
    assert scores[1] == pytest.approx(scores[0], abs=1e-4)  # its head was taken on


def test_scores_make_pairs_that_a_stage_can_train_on(run: Path, inputs: Path, tmp_path: Path) -> None:
    answers = tmp_path / "answers.jsonl"
    rows = [json.loads(line) for line in (inputs / "pairs.jsonl").read_text().splitlines()]
    lines = [{"instruction": row["prompt"], "output": row[side]} for row in rows for side in ("rejected", "chosen")]
    lines.append({"instruction": "Say nothing.", "output": ""})
    answers.write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = score_file(str(run), answers, tmp_path / "pairs.jsonl", ScoreOptions(make_pairs=True, keep_top=0.5))
    assert report.num_written == 4
    assert report.unscored == (("empty answer", 1),)
    made = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert all(row["chosen"][0]["content"].startswith("Gladly") for row in made)
    stage = {**recipe_of(inputs)["stages"][2], "train": [{"path": str(tmp_path / "pairs.jsonl")}]}  # type: ignore[index]
    assert tunesmith.check(tiny_recipe(inputs, name="made", stages=[stage])).ok
    with pytest.raises(DataError, match="exists already"):
        score_file(str(run), answers, tmp_path / "pairs.jsonl")
