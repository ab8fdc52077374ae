"""The peers' side: the Hugging Face Trainer, TRL's SFTTrainer and DPOTrainer, in the environment of bench.sh.

In: jobs. Out: see jobs. Must not know: Tunesmith. Each gets what its documentation shows: a model, rows, a LoRA
configuration, `save_steps`, and `train(resume_from_checkpoint=True)` to go on.

python -m benchmarks.reliability.worker_peers JOBS
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", HF_DATASETS_DISABLE_PROGRESS_BARS="1")

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from benchmarks.reliability.jobs import BATCH, NUM_STEPS, SAVE_EVERY, WEIGHTS, Job, die, note_first_step, run_jobs

torch.set_num_threads(1)


class Killing(TrainerCallback):
    """Notes where the training begins; the process dies behind a step."""

    def __init__(self, killed_after: int | None) -> None:
        self._killed_after = killed_after

    def on_train_begin(self, args, state, control, **kwargs) -> None:  # noqa: ANN001, ANN003
        note_first_step(state.global_step)

    def on_step_begin(self, args, state, control, **kwargs) -> None:  # noqa: ANN001, ANN003
        if state.global_step == self._killed_after:
            die()


def train(job: Job) -> None:
    """Train, or go on."""
    set_seed(0)
    trainer = make_trainer(job)
    trainer.add_callback(Killing(job.killed_after))
    if job.killed_in_save is not None:
        _die_in_save(trainer, job.killed_in_save)
    trainer.train(resume_from_checkpoint=True if job.resume else None)
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    save_file(weights, WEIGHTS)


def make_trainer(job: Job) -> Trainer:
    """The system's trainer on the rows that lie in the job's folder."""
    rows = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    options = {
        "output_dir": "out",
        "max_steps": NUM_STEPS,
        "per_device_train_batch_size": BATCH,
        "learning_rate": job.learning_rate,
        "save_strategy": "steps",
        "save_steps": SAVE_EVERY,
        "save_total_limit": 2,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "seed": 0,
    }
    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM")
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if job.system == "HF Trainer":
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(job.model), lora)
        texts = ["\n".join(turn["content"] for turn in row["messages"]) for row in rows]
        data = Dataset.from_list([{"input_ids": tokenizer(text)["input_ids"]} for text in texts])
        collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
        return Trainer(model=model, args=TrainingArguments(**options), train_dataset=data, data_collator=collator)
    kinds = {"TRL SFT": (SFTTrainer, SFTConfig), "TRL DPO": (DPOTrainer, DPOConfig)}
    trainer, config = kinds[job.system]
    return trainer(
        model=job.model,
        args=config(**options),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=lora,
    )


def _die_in_save(trainer: Trainer, step: int) -> None:
    """The weights of that step's checkpoint are written, its optimizer is not."""
    save = trainer._save_optimizer_and_scheduler

    def save_or_die(output_dir: str) -> None:
        if trainer.state.global_step == step:
            die()
        save(output_dir)

    trainer._save_optimizer_and_scheduler = save_or_die


if __name__ == "__main__":
    run_jobs(Path(sys.argv[1]), train)
