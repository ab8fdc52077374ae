"""One side of a case under TRL, in a process of its own.

In: a job's JSON. Out: lines of JSON for the driver. Must not know: Tunesmith.

TRL gets what its users would give it, through its public classes: text, a tokenizer (one word, one id), a LoRA
configuration, the model. The ids that it made are then checked one by one against the rows. Two kindnesses keep its
start short and touch no measured step: the adapter's first values are ours, so that all losses can be compared, and
the hash of the weights that names a cache file of its precomputed reference is a constant.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", HF_DATASETS_DISABLE_PROGRESS_BARS="1")
os.environ.update(TQDM_DISABLE="1", PYTHONWARNINGS="ignore")

import torch
import transformers
import trl
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.trainer import dpo_trainer

from benchmarks.gpu.build import fill_adapter, make_model
from benchmarks.gpu.cases import Case, Side, from_json
from benchmarks.gpu.meter import Finished, Rounds, Talk, synchronize, toy_threads
from benchmarks.gpu.rows import make_rows
from benchmarks.gpu.shapes import LORA_ALPHA, LORA_RANK, SHAPES
from benchmarks.workload import EOS_ID, FIRST_WORD_ID, Pair

SEED, LEARNING_RATE, BETA = 0, 1e-4, 0.1
TOY_SCALE = 0.03
LONGEST_ROW = 4096  # above every prompt + answer, so nothing is truncated
FLASH = "flash_attention_2"


class Clock(TrainerCallback):
    """Tells the rounds of every step."""

    def __init__(self, rounds: Rounds) -> None:
        self.rounds = rounds

    def on_step_end(self, args, state, control, **kwargs) -> None:  # noqa: ANN001, ANN003
        self.rounds.stepped()

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:  # noqa: ANN001, ANN003
        if "loss" in logs:
            self.rounds.lost(float(logs["loss"]))


def word_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Word `w7` is id 7."""
    vocab = {"<pad>": 0, "<unk>": 1, "</s>": EOS_ID} | {f"w{n}": n for n in range(FIRST_WORD_ID, vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


def text(ids: list[int]) -> str:
    """Ids as words; a leading space keeps an answer's first word apart from the prompt's last."""
    return "".join(" </s>" if token == EOS_ID else f" w{token}" for token in ids)


def make_config(case: Case, side: Side, folder: str, *, num_steps: int, on_cpu: bool) -> DPOConfig | SFTConfig:
    """TRL's own defaults but for the side's settings and what the benchmark fixes for both sides."""
    common: dict[str, Any] = {
        "output_dir": folder,
        "per_device_train_batch_size": side.batch,
        "gradient_accumulation_steps": case.pairs_per_step // side.batch,
        "max_steps": num_steps,
        "max_length": LONGEST_ROW,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "gradient_checkpointing": side.checkpointing == "full",
        "train_sampling_strategy": "sequential",  # both sides take the pairs in the same order
        "logging_steps": 1,
        "logging_first_step": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": SEED,
        "use_liger_kernel": side.liger,
        "bf16": not on_cpu and case.dtype == "bfloat16",
        "use_cpu": on_cpu,
    }
    if case.method == "dpo":
        return DPOConfig(beta=BETA, precompute_ref_log_probs=side.precompute, **common)
    return SFTConfig(padding_free=side.padding_free, **common)


def make_dataset(pairs: list[Pair], method: str) -> Dataset:
    """The rows as text."""
    rows = [{"prompt": text(p.prompt), "chosen": text(p.chosen), "rejected": text(p.rejected)} for p in pairs]
    if method == "sft":
        rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    return Dataset.from_list(rows)


def check_rows(trainer: DPOTrainer | SFTTrainer, pairs: list[Pair], method: str) -> None:
    """Refuse to time other rows than ours: every id and every trained position must be the same."""
    assert len(trainer.train_dataset) == len(pairs)
    for row, pair in zip(trainer.train_dataset, pairs, strict=True):
        if method == "dpo":
            found = (row["prompt_ids"], row["chosen_ids"], row["rejected_ids"])
            same = found == (pair.prompt, pair.chosen, pair.rejected)
        else:
            labels = [-100] * len(pair.prompt) + pair.chosen
            same = row["input_ids"] == pair.prompt + pair.chosen and row["labels"] == labels
        if not same:
            raise RuntimeError("TRL trains on other tokens than the rows'")


def _time_reference(talk: Talk, device: torch.device, num_pairs: int) -> None:
    """Wrap TRL's precomputation of the reference, which its constructor runs, in a clock."""
    original = dpo_trainer.DPOTrainer._precompute_ref_logps

    def timed(self, *args, **kwargs) -> Dataset:  # noqa: ANN001, ANN002, ANN003
        fill_adapter(self.model, seed=SEED)
        synchronize(device)
        start = time.perf_counter()
        scored = original(self, *args, **kwargs)
        synchronize(device)
        talk.say("reference", seconds=time.perf_counter() - start, pairs=num_pairs)
        return scored

    dpo_trainer.DPOTrainer._precompute_ref_logps = timed
    dpo_trainer.hash_module = lambda _module: "random weights"


def refuse_missing(side: Side) -> None:
    """End with a sentence where a side needs a package that is not there."""
    needed = [("liger_kernel", side.liger), ("flash_attn", side.padding_free)]
    missing = [name for name, wanted in needed if wanted and find_spec(name) is None]
    if missing:
        raise SystemExit(f"not measured: {', '.join(missing)} is not installed")


def measure(case: Case, side: Side, *, talk: Talk, toy: bool = False) -> None:
    """Build, wait, warm up, measure every round; ends by itself after the last."""
    if toy:
        torch.set_num_threads(toy_threads())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rounds = Rounds(talk, device, case.timed_steps, case.rounds)
    shape = SHAPES[case.model].toy() if toy else SHAPES[case.model]
    num_pairs, scale = rounds.num_steps * case.pairs_per_step, TOY_SCALE if toy else 1.0
    pairs = make_rows(case.rows, num_pairs, seed=SEED, vocab_size=shape.vocab, scale=scale)
    dtype = (
        torch.float32 if device.type == "cpu" else {"bfloat16": torch.bfloat16, "float16": torch.float16}[case.dtype]
    )
    attention = FLASH if side.padding_free else None
    model = make_model(
        shape, device=device, dtype=dtype, quantization=case.quantization, attention=attention, seed=SEED
    )
    lora = LoraConfig(
        r=LORA_RANK, lora_alpha=LORA_ALPHA, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    with tempfile.TemporaryDirectory(prefix="trl-gpu-") as folder:
        os.environ["HF_DATASETS_CACHE"] = folder
        try:
            rounds.begin()
            _time_reference(talk, device, num_pairs)
            trainer = (DPOTrainer if case.method == "dpo" else SFTTrainer)(
                model=model,
                args=make_config(case, side, folder, num_steps=rounds.num_steps, on_cpu=device.type == "cpu"),
                train_dataset=make_dataset(pairs, case.method),
                processing_class=word_tokenizer(shape.vocab),
                peft_config=lora,
                callbacks=[Clock(rounds)],
            )
            fill_adapter(trainer.model, seed=SEED)
            check_rows(trainer, pairs, case.method)
            trainer.train()
        except Finished:
            pass
    versions = {"trl": trl.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    talk.say("done", notes=[], versions=versions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--job", required=True, help="the JSON of cases.as_json")
    parser.add_argument("--talk", type=int, required=True, help="file descriptor of the driver's pipe")
    parser.add_argument("--toy", action="store_true")
    args = parser.parse_args()
    case, side = from_json(json.loads(args.job))
    refuse_missing(side)
    measure(
        case,
        replace(side, batch=min(side.batch, case.pairs_per_step)),
        talk=Talk(os.fdopen(args.talk, "w")),
        toy=args.toy,
    )


if __name__ == "__main__":
    main()
