"""A tiny model folder with a tokenizer of its own, and data files, made on the spot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.support.models import tiny_model

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXTS = ["What is the colour of the sea?", "The sea is blue.", "It is green, or grey.", "Who knows?", "user assistant"]


def make_tokenizer(*, chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """Byte-level BPE over a few sentences, with ChatML's tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 4, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    wrapped.chat_template = chat_template
    return wrapped


def make_model_folder(folder: Path, *, family: str = "llama", chat_template: str | None = CHATML) -> Path:
    """A two-layer random model with its tokenizer, as transformers saves them."""
    tokenizer = make_tokenizer(chat_template=chat_template)
    model = tiny_model(family, vocab_size=len(tokenizer), max_position_embeddings=256, tie_word_embeddings=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    """A JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def questions(count: int) -> list[dict[str, object]]:
    """Question/answer rows."""
    return [{"question": f"Which is number {number}?", "answer": f"It is {number}."} for number in range(count)]


def pairs(count: int) -> list[dict[str, object]]:
    """Preference rows."""
    return [
        {"prompt": f"Say {number}.", "chosen": f"Gladly: {number}.", "rejected": f"No, {number} it is not."}
        for number in range(count)
    ]


def tiny_recipe(folder: Path, **changes: object) -> dict[str, object]:
    """SFT and DPO of two steps each, on the files and the model that `make_run_inputs` puts into `folder`."""
    stages: list[dict[str, object]] = [
        {"name": "sft", "method": "sft", "train": [{"path": str(folder / "sft.jsonl")}], "batch_size": 4},
        {
            "name": "dpo",
            "method": "dpo",
            "train": [{"path": str(folder / "pairs.jsonl")}],
            "heldout": [{"path": str(folder / "heldout.jsonl")}],
            "batch_size": 4,
            "learning_rate": 1e-3,
        },
    ]
    for stage in stages:
        stage.update({"max_length": 128, "tuning": {"kind": "lora", "r": 4, "alpha": 8}})
    recipe: dict[str, object] = {
        "name": "tiny",
        "runs_folder": str(folder / "runs"),
        "threads": 1,
        "model": {"path": str(folder / "model")},
        "stages": stages,
    }
    return recipe | changes


def make_run_inputs(folder: Path) -> Path:
    """Model, SFT rows, pairs and held-out pairs."""
    make_model_folder(folder / "model")
    write_rows(folder / "sft.jsonl", questions(8))
    write_rows(folder / "pairs.jsonl", pairs(8))
    write_rows(folder / "heldout.jsonl", [{**row, "prompt": f"And {row['prompt']}"} for row in pairs(4)])
    return folder
