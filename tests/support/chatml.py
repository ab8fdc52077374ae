"""A base model whose tokenizer knows nothing of ChatML."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.support.folders import TEXTS, make_run_inputs
from tests.support.models import tiny_model


def bare_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over a few sentences; its one control token is <|endoftext|>, and it has no template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


def bare_folder(folder: Path, *, tied: bool, spare_rows: int = 0) -> Path:
    """A tiny random Llama with that tokenizer, and `spare_rows` rows behind its vocabulary."""
    tokenizer = bare_tokenizer()
    model = tiny_model(
        "llama",
        vocab_size=len(tokenizer) + spare_rows,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=0,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def bare_inputs(folder: Path, *, tied: bool) -> Path:
    """The files of `make_run_inputs`, and the bare model as `bare` beside them."""
    make_run_inputs(folder)
    bare_folder(folder / "bare", tied=tied)
    return folder
