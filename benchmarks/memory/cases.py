"""The configurations whose memory is predicted and measured, and what they are made of.

In: a case. Out: its model's folder, its rows and its recipe. Must not know: how memory is predicted or measured.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np


@dataclass(frozen=True)
class Size:
    """A Llama with random weights; tied embeddings."""

    hidden: int
    layers: int
    wide: int
    vocabulary: int = 8192

    def config(self) -> dict[str, object]:
        """What config.json says."""
        return {
            "hidden_size": self.hidden,
            "intermediate_size": self.wide,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.hidden // 64,
            "num_key_value_heads": max(1, self.hidden // 128),
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": True,
            "max_position_embeddings": 8192,
        }


S20 = Size(384, 8, 1024, 16_384)
S60 = Size(640, 10, 1728)
S110 = Size(768, 12, 3072)
S300 = Size(1024, 22, 3584)
WIDE = Size(512, 4, 1408, 152_064)


@dataclass(frozen=True)
class Case:
    """One configuration. `row_tokens`: about how long a row is, prompt and answers together."""

    name: str
    size: Size
    method: Literal["sft", "dpo"]
    tuning: Literal["lora", "full"]
    forest_tokens: int
    checkpointing: Literal["none", "selective", "full"] = "none"
    row_tokens: int = 256
    quantization: Literal["none", "nf4", "int8"] = "none"
    optimizer: str = "adamw"
    num_rows: int = 24
    batch_size: int = 8


CASES = (
    Case("20M SFT LoRA", S20, "sft", "lora", 1024),
    Case("20M DPO LoRA, 256 tokens", S20, "dpo", "lora", 256),
    Case("20M DPO LoRA, 4096 tokens", S20, "dpo", "lora", 4096, batch_size=16),
    Case("20M SFT full", S20, "sft", "full", 1024),
    Case("60M DPO LoRA", S60, "dpo", "lora", 2048, batch_size=16),
    Case("60M DPO LoRA, checkpointing full", S60, "dpo", "lora", 2048, "full", batch_size=16),
    Case("60M DPO LoRA, checkpointing selective", S60, "dpo", "lora", 2048, "selective", batch_size=16),
    Case("60M SFT full, checkpointing full", S60, "sft", "full", 1024, "full"),
    Case("60M SFT full, 8-bit AdamW", S60, "sft", "full", 512, optimizer="adamw_8bit"),
    Case("110M DPO LoRA", S110, "dpo", "lora", 1024),
    Case("110M DPO LoRA, NF4", S110, "dpo", "lora", 1024, quantization="nf4"),
    Case("110M DPO LoRA, int8", S110, "dpo", "lora", 1024, quantization="int8"),
    Case("110M SFT LoRA, rows of 2048", S110, "sft", "lora", 2048, row_tokens=2048, num_rows=4, batch_size=2),
    Case("80M DPO LoRA, vocabulary of 152,064", WIDE, "dpo", "lora", 1024),
    Case("300M DPO LoRA, checkpointing full", S300, "dpo", "lora", 1024, "full"),
    Case("300M SFT LoRA, NF4, checkpointing full", S300, "sft", "lora", 512, "full", quantization="nf4"),
)


def make_model(size: Size, folder: Path) -> Path:
    """The model with random weights and the tokenizer of the embedded model; made once."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tunesmith.recipe.resources import embedded

    target = folder / f"model-{size.hidden}-{size.layers}-{size.vocabulary}"
    if (target / "model.safetensors").is_file():
        return target
    torch.manual_seed(0)
    base = embedded("embedded:quickstart/model")
    assert base is not None
    LlamaForCausalLM(LlamaConfig(**size.config())).save_pretrained(target)  # type: ignore[arg-type]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, target / name)
    return target


def write_rows(case: Case, path: Path) -> None:
    """Rows of random words, three to five tokens each; answers are a third of an SFT row and two thirds of a pair."""
    random = np.random.default_rng(0)

    def words(tokens: float) -> str:
        count = max(4, int(tokens * random.uniform(0.8, 1.0) / 2.4))
        return " ".join("".join(random.choice(list("abdefgiklmnorstu"), 4)) for _ in range(count))

    with path.open("w") as file:
        for _ in range(case.num_rows):
            third = case.row_tokens / 3
            if case.method == "dpo":
                row = {"prompt": words(third), "chosen": words(third), "rejected": words(third)}
            else:
                row = {"prompt": words(2 * third), "completion": words(third)}
            file.write(json.dumps(row) + "\n")


def recipe_of(case: Case, model: Path, rows: Path, folder: Path) -> dict[str, object]:
    """The recipe of a case: two steps."""
    stage = {
        "name": "stage",
        "method": case.method,
        "train": [{"path": str(rows)}],
        "max_length": 8192,
        "max_steps": 2,
        "batch_size": case.batch_size,
        "tuning": {"kind": case.tuning},
        "forest_tokens": case.forest_tokens,
        "gradient_checkpointing": case.checkpointing,
        "optimizer": case.optimizer,
        "learning_rate": 1e-5,
    }
    return {
        "name": "run",
        "model": {"path": str(model), "quantization": case.quantization},
        "stages": [stage],
        "runs_folder": str(folder / "runs"),
        "memory": "8GB",
        "threads": 1,
        "data_workers": 1,
    }
