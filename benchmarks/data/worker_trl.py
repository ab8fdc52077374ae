"""TRL's own preparation of a file, timed, under the Python of `benchmarks/.venv-bench`.

In: a method, a file of rows, a tokenizer with its template. Out: one JSON file. Must not know: Tunesmith.

What is timed: reading the JSON lines and `_prepare_dataset` of the trainer's own construction (masks included:
`assistant_only_loss` for SFT), not the model, not the imports.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1")

from datasets import load_dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

seconds: list[float] = []


def timed(trainer: type) -> type:
    """The trainer with a clock around its preparation."""

    class Timed(trainer):
        def _prepare_dataset(self, *args, **kwargs):  # noqa: ANN002, ANN003, ANN202
            start = time.perf_counter()
            try:
                return super()._prepare_dataset(*args, **kwargs)
            finally:
                seconds.append(time.perf_counter() - start)

    return Timed


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--method", choices=("sft", "dpo"))
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--tokenizer")
    parser.add_argument("--template", type=Path)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    tokenizer.chat_template = args.template.read_text()
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    with tempfile.TemporaryDirectory() as folder:
        model = f"{folder}/model"  # TRL reads the reference from the disk, so the model must be there
        LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(model)
        start = time.perf_counter()
        dataset = load_dataset("json", data_files=str(args.rows), split="train", cache_dir=folder)
        reading = time.perf_counter() - start
        common = {
            "output_dir": folder,
            "report_to": [],
            "max_length": None,
            "use_cpu": True,
            "bf16": False,
            "dataset_num_proc": args.processes if args.processes > 1 else None,
        }
        if args.method == "sft":
            config = SFTConfig(**common, assistant_only_loss=True)
            trainer = timed(SFTTrainer)(model, args=config, train_dataset=dataset, processing_class=tokenizer)
        else:
            config = DPOConfig(**common)
            trainer = timed(DPOTrainer)(model, args=config, train_dataset=dataset, processing_class=tokenizer)
        prepared = trainer.train_dataset
        first = prepared[0]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    tokens = sum(
        len(first[name]) for name in ("input_ids", "prompt_ids", "chosen_ids", "rejected_ids") if name in first
    )
    result = {
        "rows": len(prepared),
        "seconds": reading + sum(seconds),
        "reading": reading,
        "peak_rss_gib": peak,
        "first_row_tokens": tokens,
    }
    args.out.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
