"""One measurement of TRL, in a process of its own, under the Python of `benchmarks/.venv-bench`.

In: the work folder, a task, TRL's setting. Out: one JSON file with times, losses, gradient norms and memory.
Must not know: Tunesmith.

TRL gets what its users would give it, through its public classes: text, a tokenizer (one word, one id), a LoRA
configuration. The ids that it made are then checked one by one against the workload's.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", HF_DATASETS_DISABLE_PROGRESS_BARS="1")

import torch
import transformers
import trl
from datasets import Dataset
from peft import LoraConfig, set_peft_model_state_dict
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from benchmarks.cases import PACKED_TOKENS, Setting
from benchmarks.workload import EOS_ID, FIRST_WORD_ID, Task, Workload, load_workload, peak_rss_gib, rss_gib

LONGEST_ROW = 2048  # above every prompt + answer, so nothing is truncated


class Clock(TrainerCallback):
    """Times from the first step's begin to the last step's end; keeps every logged loss and gradient norm."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.cpu_times: list[float] = []
        self.losses: list[float] = []
        self.norms: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs) -> None:  # noqa: ANN001, ANN003
        if not self.times:
            self.on_step_end(args, state, control)

    def on_step_end(self, args, state, control, **kwargs) -> None:  # noqa: ANN001, ANN003
        self.times.append(time.perf_counter())
        self.cpu_times.append(time.process_time())

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:  # noqa: ANN001, ANN003
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))
            self.norms.append(float(logs["grad_norm"]))


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


def common_options(workload: Workload, folder: Path, setting: Setting) -> dict[str, object]:
    """What DPOConfig and SFTConfig share."""
    return {
        "output_dir": str(folder / "trl"),
        "per_device_train_batch_size": setting.batch,
        "gradient_accumulation_steps": workload.pairs_per_step // setting.batch,
        "max_steps": workload.num_steps,
        "max_length": LONGEST_ROW,
        "learning_rate": workload.learning_rate,
        "lr_scheduler_type": "constant",
        "max_grad_norm": workload.max_grad_norm,
        "bf16": False,
        "gradient_checkpointing": setting.checkpointing,
        "use_cpu": True,
        "train_sampling_strategy": "sequential",  # both sides take the pairs in the same order
        "logging_steps": 1,
        "logging_first_step": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": workload.seed,
    }


def make_config(workload: Workload, folder: Path, task: Task, setting: Setting) -> DPOConfig | SFTConfig:
    """TRL's defaults, but for what the benchmark fixes for both sides and the setting that is measured."""
    options = common_options(workload, folder, setting)
    if task.method == "dpo":
        return DPOConfig(beta=workload.beta, precompute_ref_log_probs=task.reference == "cached", **options)
    if setting.flat == "padding_free":
        options |= {"padding_free": True, "max_length": None}  # TRL refuses to cut rows that it does not pad
    if setting.flat == "bfd":
        options |= {"packing": True, "packing_strategy": "bfd", "max_length": PACKED_TOKENS, "shuffle_dataset": False}
    return SFTConfig(**options)


def make_trainer(
    workload: Workload, folder: Path, *, task: Task, setting: Setting, clock: Clock
) -> DPOTrainer | SFTTrainer:
    """TRL's own trainer; the adapter, where there is one, starts with the shared weights."""
    lora = LoraConfig(
        r=workload.shape.lora_rank,
        lora_alpha=workload.lora_alpha,
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    rows = [{"prompt": text(p.prompt), "chosen": text(p.chosen), "rejected": text(p.rejected)} for p in workload.pairs]
    if task.method == "sft":
        rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    trainer_class = DPOTrainer if task.method == "dpo" else SFTTrainer
    trainer = trainer_class(
        model=str(folder / "model"),
        args=make_config(workload, folder, task, setting),
        train_dataset=Dataset.from_list(rows),
        processing_class=word_tokenizer(workload.shape.vocab_size),
        peft_config=lora if task.tuning == "lora" else None,
        callbacks=[clock],
    )
    if setting.flat == "bfd":  # a step is all rows, in as many sequences as they were packed into
        trainer.args.gradient_accumulation_steps = len(trainer.train_dataset)
        trainer.accelerator.gradient_accumulation_steps = len(trainer.train_dataset)
    if task.tuning == "lora":
        weights = load_file(folder / "adapter" / "adapter_model.safetensors")
        assert not set_peft_model_state_dict(trainer.model, weights).unexpected_keys
    return trainer


def check_rows(trainer: DPOTrainer | SFTTrainer, workload: Workload, task: Task, setting: Setting) -> None:
    """Refuse to time another data set than ours: every id and every trained position must be the workload's."""
    rows, pairs = trainer.train_dataset, workload.pairs
    if task.method == "dpo":
        found = [(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in rows]
        wanted = [(pair.prompt, pair.chosen, pair.rejected) for pair in pairs]
    else:
        found = [piece for row in rows for piece in _pieces(row, setting)]
        wanted = [(pair.prompt + pair.chosen, [-100] * len(pair.prompt) + pair.chosen) for pair in pairs]
    if setting.flat == "bfd":
        found, wanted = sorted(found), sorted(wanted)
    if found != wanted:
        raise RuntimeError("TRL trains on other tokens than the workload's")


def _pieces(row: dict[str, list[int]], setting: Setting) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of the rows that lie in a row of TRL's: one, or where it packed, several."""
    if setting.flat != "bfd":
        return [(row["input_ids"], row["labels"])]
    pieces, start = [], 0
    for length in row["seq_lengths"]:
        part = slice(start, start + length)
        pieces.append((row["input_ids"][part], row["labels"][part]))
        start += length
    return pieces


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", default="workload.json", help="the rows' file in the folder")
    parser.add_argument("--method", choices=("dpo", "sft"), required=True)
    parser.add_argument("--tuning", choices=("lora", "full"), default="lora")
    parser.add_argument("--reference", choices=("loop", "cached", "none"), default="none")
    parser.add_argument("--setting", type=Setting.parse, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    task = Task(args.method, args.tuning, args.reference)
    workload = load_workload(args.folder / args.rows)
    torch.set_num_threads(workload.num_threads)
    clock = Clock()
    trainer = make_trainer(workload, args.folder, task=task, setting=args.setting, clock=clock)
    check_rows(trainer, workload, task, args.setting)
    loaded_gib = rss_gib()
    trainer.train()
    result = {
        "seconds": clock.times[-1] - clock.times[0],
        "cpu_seconds": clock.cpu_times[-1] - clock.cpu_times[0],
        "losses": clock.losses,
        "gradient_norms": clock.norms,
        "loaded_rss_gib": loaded_gib,
        "peak_rss_gib": peak_rss_gib(),
        "threads": torch.get_num_threads(),
        "versions": {"trl": trl.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }
    args.out.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
