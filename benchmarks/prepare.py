"""Make what both sides start from: seeded weights and a seeded adapter. Run once a call, under Tunesmith's own Python.

In: `workload.json`. Out: `model/` and `adapter/` beside it. Must not know: who will be measured.

The adapter's first values are shared too, so that every loss of the two sides can be compared, not only the first.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.workload import EOS_ID, PAD_ID, Workload, load_workload


def make_model(workload: Workload) -> LlamaForCausalLM:
    """A Llama with random weights, float32."""
    shape = workload.shape
    torch.manual_seed(workload.seed)
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        intermediate_size=shape.intermediate_size,
        max_position_embeddings=16_384,  # above every row, the long ones too; costs nothing
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
        dtype="float32",
    )
    return LlamaForCausalLM(config).float()


def prepare(workload: Workload, folder: Path) -> None:
    """Write the model and its adapter."""
    model = make_model(workload)
    model.save_pretrained(folder / "model")
    lora = LoraConfig(r=workload.shape.lora_rank, lora_alpha=workload.lora_alpha, target_modules="all-linear")
    get_peft_model(model, lora).save_pretrained(folder / "adapter")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="holds workload.json")
    folder = parser.parse_args().folder
    prepare(load_workload(folder / "workload.json"), folder)


if __name__ == "__main__":
    main()
