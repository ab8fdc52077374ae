"""The whole path on real rows and a real, tiny, pretrained Llama: SFT, then DPO twice, then merged and read back."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tunesmith
from tunesmith.model.load import load_model, load_tokenizer
from tunesmith.recipe.models import Model
from tunesmith.sample.generate import generate

HARMLESS, STYLE = "pref/hh_rlhf_harmless_test.jsonl.gz", "pref/alpaca_style_preference_1100.json"

FRESH_PROCESS = """
import sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
with torch.inference_mode():
    save_file({"logits": model(input_ids=torch.tensor([[1, 40, 50, 60]])).logits}, sys.argv[2])
"""


def _records(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _dpo(data: Path, name: str, file: str) -> dict[str, object]:
    return {
        "name": name,
        "method": "dpo",
        "train": [{"path": str(data / file), "limit": 48}],
        "heldout_fraction": 0.2,
        "max_length": 512,
        "learning_rate": 1e-3,
        "batch_size": 16,
        "epochs": 2,
        "max_steps": 6,
    }


@pytest.fixture(scope="module")
def run(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = {
        "name": "real",
        "runs_folder": str(tmp_path_factory.mktemp("runs")),
        "threads": 1,
        "model": {"path": str(shared_data / "models/stories260K")},
        "stages": [
            {
                "name": "sft",
                "method": "sft",
                "train": [{"path": str(shared_data / "sft/alpaca_en_demo.json"), "limit": 200}],
                "max_length": 512,
                "learning_rate": 3e-3,
                "batch_size": 16,
                "max_steps": 12,
                "epochs": 4,
            },
            _dpo(shared_data, "harmless", HARMLESS),
            _dpo(shared_data, "style", STYLE),
        ],
    }
    return tunesmith.run(recipe)


def test_the_untouched_model_still_tells_its_story(shared_data: Path) -> None:
    folder = shared_data / "models/stories260K"
    expected = (folder / "EXPECTED.md").read_text().split("-t 0.0\n")[1].split("\n```")[0]
    model = Model(path=str(folder))
    tokenizer = load_tokenizer(model)
    loaded = load_model(model, device=torch.device("cpu"), dtype=torch.float32)
    (answer,) = generate(loaded, [[tokenizer.bos_token_id]], max_new_tokens=100, stop_ids=[tokenizer.bos_token_id])
    told = tokenizer.decode(answer.ids).strip()
    assert len(told) > 100
    assert expected.startswith(told)


def test_losses_fall_in_every_stage(run: Path) -> None:
    for stage in ("sft", "harmless", "style"):
        losses = [record["loss"] for record in _records(run / f"stages/{stage}/metrics.jsonl")]
        assert sum(losses[-3:]) < sum(losses[:3]), stage


def test_dpo_starts_at_ln_2_with_the_sft_model_as_its_reference(run: Path) -> None:
    for stage in ("harmless", "style"):
        first = _records(run / f"stages/{stage}/metrics.jsonl")[0]
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
        assert first["margin"] == pytest.approx(0, abs=1e-5)
        start = _records(run / f"stages/{stage}/eval.jsonl")[0]
        assert start["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_one_adapter_runs_through_all_stages(run: Path) -> None:
    results = [json.loads((run / f"stages/{stage}/result.json").read_text()) for stage in ("sft", "harmless", "style")]
    assert {result["kind"] for result in results} == {"adapter"}
    assert len({json.dumps(result["full"]) for result in results}) == 1
    assert len({result["weights_sha256"] for result in results}) == 3


def test_every_row_is_in_the_ledger(run: Path) -> None:
    from tunesmith.data.ledger import read_parquet

    entries = list(read_parquet(run / "ledger.parquet"))
    assert len(entries) == 200 + 48 + 48
    assert all(entry.reason for entry in entries if entry.outcome == "dropped")


def test_the_merged_model_reloads_in_a_fresh_process_with_equal_logits(run: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    merged = tunesmith.merge(run)
    stage = tunesmith.load(run)
    assert stage.name == "style"
    with torch.inference_mode():
        wanted = stage.model(input_ids=torch.tensor([[1, 40, 50, 60]])).logits
    out = tmp_path / "logits.safetensors"
    subprocess.run([sys.executable, "-c", FRESH_PROCESS, str(merged), str(out)], check=True, capture_output=True)
    torch.testing.assert_close(load_file(out)["logits"], wanted, rtol=1e-5, atol=1e-5)
    saved = json.loads((merged / "generation_config.json").read_text())
    assert saved["eos_token_id"] in (list(stage.stop_ids), stage.stop_ids[0])
    assert load_tokenizer(Model(path=str(merged))).chat_template == stage.renderer.template.source


def test_the_adapter_is_plain_peft(run: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    loaded = AutoPeftModelForCausalLM.from_pretrained(str(run / "stages/style/adapter")).eval()
    stage = tunesmith.load(run, "style")
    ids = torch.tensor([[1, 40, 50, 60]])
    with torch.inference_mode():
        torch.testing.assert_close(loaded(input_ids=ids).logits, stage.model(input_ids=ids).logits)


def test_running_it_again_runs_nothing_again(run: Path, shared_data: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.glob("stages/*/*/*.safetensors")}
    tunesmith.run(str(run / "recipe.yaml"))
    assert before
    assert {path: path.stat().st_mtime_ns for path in before} == before
