"""`chat_template: chatml` on a base that lacks its tokens: added, trained, and there in whatever a run leaves."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tunesmith
from tests.support.chatml import bare_inputs
from tests.support.folders import tiny_recipe
from tunesmith.errors import ModelError
from tunesmith.pipeline.run import run_recipe
from tunesmith.recipe.load import parse_recipe
from tunesmith.train.progress import Silent

QUESTION = "Which is number 3?"
NOTE = "added tokens <|im_start|>, <|im_end|>: their embeddings are trained"
FRESH_PROCESS = """
import sys
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

base, adapter, merged, question, out = sys.argv[1:]
found = {}
for name, folder in (("adapter", adapter), ("merged", merged)):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if name == "merged":
        model = AutoModelForCausalLM.from_pretrained(merged)
    else:
        model = AutoModelForCausalLM.from_pretrained(base)
        model.resize_token_embeddings(len(tokenizer))
        model = PeftModel.from_pretrained(model, adapter)
        model.generation_config = GenerationConfig.from_pretrained(adapter)
    messages = [{"role": "user", "content": question}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    force = lambda row, scores: torch.full_like(scores, -1e9).index_fill(1, torch.tensor([end]), 0.0)
    with torch.inference_mode():
        logits = model.eval()(input_ids=ids).logits
        answer = model.generate(ids, max_new_tokens=40, do_sample=False)[:, ids.shape[1]:]
        forced = model.generate(ids, max_new_tokens=40, logits_processor=[force])[:, ids.shape[1]:]
    parts = {"ids": ids, "logits": logits, "answer": answer, "forced": forced}
    found |= {f"{name}.{part}": tensor.contiguous() for part, tensor in parts.items()}
save_file(found, out)
"""


class Notes(Silent):
    """Keeps what a run says."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def noted(self, text: str) -> None:
        self.lines.append(text)


def _recipe(inputs: Path, **changes: object) -> dict[str, object]:
    """SFT long enough that the answers are known by heart and end, then two steps of DPO."""
    recipe = tiny_recipe(inputs, model={"path": str(inputs / "bare"), "chat_template": "chatml"}) | changes
    stages = recipe["stages"]
    assert isinstance(stages, list)
    stages[0] |= {"epochs": 30, "learning_rate": 2e-2, "save_every": 20, "keep_checkpoints": 9}
    return recipe


def _first(run: Path, stage: str = "dpo") -> dict[str, float]:
    first: dict[str, float] = json.loads((run / f"stages/{stage}/metrics.jsonl").read_text().splitlines()[0])
    return first


def _stop_ids(folder: Path) -> list[int]:
    found = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    return found if isinstance(found, list) else [found]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def inputs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bare_inputs(tmp_path_factory.mktemp("inputs"), tied=request.param)


@pytest.fixture(scope="module")
def ran(inputs: Path) -> tuple[Path, list[str]]:
    notes = Notes()
    return run_recipe(parse_recipe(_recipe(inputs)), observer=notes), notes.lines


@pytest.fixture(scope="module")
def run(ran: tuple[Path, list[str]]) -> Path:
    return ran[0]


@pytest.fixture(scope="module")
def merged(run: Path) -> Path:
    return tunesmith.merge(run)


def test_the_run_and_the_check_say_so(inputs: Path, ran: tuple[Path, list[str]]) -> None:
    _, said = ran
    assert said.count(NOTE) == 2  # once a stage
    report = tunesmith.check(_recipe(inputs, name="checked"))
    assert report.ok
    assert [line.text for line in report.lines].count(NOTE) == 2
    assert all("FAILED" not in line for line in said)


def test_dpo_on_the_sft_adapter_starts_at_ln_2(run: Path) -> None:
    assert _first(run)["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert _first(run)["margin"] == pytest.approx(0, abs=1e-5)


def test_the_rows_were_trained_in_both_stages_and_nothing_else_of_the_embeddings_is_kept(run: Path) -> None:
    sft, dpo = (load_file(run / f"stages/{stage}/adapter/adapter_model.safetensors") for stage in ("sft", "dpo"))
    assert sft.keys() == dpo.keys()
    rows = [name for name in sft if "lora" not in name]
    assert rows
    for name in rows:
        assert sft[name].shape == (2, 32)
        assert not torch.equal(sft[name], dpo[name])
        assert not torch.allclose(sft[name][0], sft[name][1], atol=1e-2)  # both started at the same mean


def test_answers_stop_at_im_end(run: Path) -> None:
    stage = tunesmith.load(run, "sft")
    end = stage.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end in stage.stop_ids
    assert end != stage.tokenizer.eos_token_id
    assert tunesmith.generate(stage, [QUESTION], max_new_tokens=40) == ["It is 3."]


def test_every_folder_says_where_generation_stops(run: Path, merged: Path) -> None:
    """TRAPS 15: the template's end of turn is not the tokenizer's end of text."""
    stage = tunesmith.load(run)
    for folder in (run / "stages/sft/adapter", run / "stages/dpo/adapter", merged):
        assert _stop_ids(folder) == list(stage.stop_ids)
        assert "<|im_end|>" in (folder / "chat_template.jinja").read_text()


def test_plain_peft_and_transformers_load_it_in_a_fresh_process(
    inputs: Path, run: Path, merged: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.safetensors"
    folders = [str(path) for path in (inputs / "bare", run / "stages/dpo/adapter", merged)]
    command = [sys.executable, "-c", FRESH_PROCESS, *folders, QUESTION, str(out)]
    subprocess.run(command, check=True, capture_output=True)
    found = load_file(out)
    stage = tunesmith.load(run)
    end = stage.tokenizer.convert_tokens_to_ids("<|im_end|>")
    (answer,) = tunesmith.generate(stage, [QUESTION], max_new_tokens=40)
    for name in ("adapter", "merged"):
        with torch.inference_mode():
            wanted = stage.model(input_ids=found[f"{name}.ids"]).logits
        torch.testing.assert_close(found[f"{name}.logits"], wanted, rtol=1e-4, atol=1e-4)
        ids = found[f"{name}.answer"][0].tolist()
        assert ids[-1] == end
        assert stage.tokenizer.decode(ids[:-1]).strip() == answer
        assert found[f"{name}.forced"][0].tolist() == [end]


def test_a_merged_model_keeps_the_tie(inputs: Path, merged: Path) -> None:
    tied = json.loads((inputs / "bare/config.json").read_text())["tie_word_embeddings"]
    assert json.loads((merged / "config.json").read_text())["tie_word_embeddings"] == tied
    assert ("lm_head.weight" in load_file(merged / "model.safetensors")) != tied


def test_a_resumed_run_is_the_same_to_the_bit(inputs: Path, run: Path, tmp_path: Path) -> None:
    again = tmp_path / "tiny"
    shutil.copytree(run, again, ignore=shutil.ignore_patterns("merged", "dpo"))
    sft = again / "stages/sft"
    shutil.rmtree(sft / "adapter")
    (sft / "result.json").unlink()
    for checkpoint in (sft / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step-")) > 20:
            shutil.rmtree(checkpoint)
    resumed = tunesmith.run(_recipe(inputs, runs_folder=str(tmp_path)))
    assert resumed == again
    for stage in ("sft", "dpo"):
        path = f"stages/{stage}/adapter/adapter_model.safetensors"
        assert (resumed / path).read_bytes() == (run / path).read_bytes()


@pytest.mark.parametrize("start", ["stage", "adapter", "merged"])
def test_another_run_starts_from_it(start: str, inputs: Path, run: Path, merged: Path) -> None:
    starts = {"stage": f"{run}:sft", "adapter": str(run / "stages/sft/adapter"), "merged": str(merged)}
    recipe = _recipe(inputs, name=f"from-{start}")
    stages = recipe["stages"]
    assert isinstance(stages, list)
    recipe["stages"] = [stages[1] | {"start": starts[start]}]
    first = _first(tunesmith.run(recipe))
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    if start != "merged":
        assert first["logprob_chosen"] == pytest.approx(_first(run)["logprob_chosen"], abs=1e-3)


def test_a_recipe_without_the_template_cannot_go_on_with_the_adapter(inputs: Path, run: Path) -> None:
    recipe = _recipe(inputs, name="plain", model={"path": str(inputs / "bare")})
    stages = recipe["stages"]
    assert isinstance(stages, list)
    recipe["stages"] = [stages[1] | {"start": f"{run}:sft"}]
    with pytest.raises(ModelError, match=r"trained embeddings of the tokens \d+, \d+, the recipe adds none"):
        tunesmith.run(recipe)


def test_the_comparison_reads_every_stage(inputs: Path) -> None:
    compare = {"num_prompts": 4, "max_new_tokens": 12, "bootstrap_samples": 100}
    run = tunesmith.run(_recipe(inputs, name="compared", compare=compare))
    assert tunesmith.compare(run).is_file()
    stages = json.loads((run / "compare/summary.json").read_text())["stages"]
    assert len(stages) == 3


def test_full_fine_tuning_leaves_a_model_that_stops(inputs: Path) -> None:
    recipe = _recipe(inputs, name="full")
    stages = recipe["stages"]
    assert isinstance(stages, list)
    stages[0] |= {"learning_rate": 5e-3, "epochs": 60}
    recipe["stages"] = [stage | {"tuning": {"kind": "full"}} for stage in stages]
    run = tunesmith.run(recipe)
    assert _first(run)["loss"] == pytest.approx(math.log(2), abs=1e-5)
    stage = tunesmith.load(run, "sft")
    (answer,) = tunesmith.generate(stage, [QUESTION], max_new_tokens=40)
    assert re.fullmatch(r"It is \d\.", answer)
    model = run / "stages/sft/model"
    assert _stop_ids(model) == list(stage.stop_ids)
    assert json.loads((model / "config.json").read_text())["vocab_size"] == len(stage.tokenizer)


def test_a_4_bit_base_trains_and_merges(inputs: Path) -> None:
    pytest.importorskip("bitsandbytes", reason='needs bitsandbytes: pip install "tunesmith[gpu]"')
    model = {"path": str(inputs / "bare"), "chat_template": "chatml", "quantization": "nf4"}
    run = tunesmith.run(_recipe(inputs, name="nf4", model=model))
    assert _first(run)["loss"] == pytest.approx(math.log(2), abs=1e-5)
    merged = tunesmith.merge(run)
    assert json.loads((merged / "merge.json").read_text())["mean_kl_nats"] < 1e-6
    assert json.loads((merged / "config.json").read_text())["vocab_size"] == len(tunesmith.load(run).tokenizer)
