"""The quickstart's base model: a small Llama trained on the almanac, in plain torch.

In: pages of text, a tokenizer, a seed. Out: a `LlamaForCausalLM` that has read the texts and never saw a chat.
Must not know: questions, answers, Tunesmith (so that the pipeline under test did not make its own base).

Shapes: B pages of a batch, T tokens of the longest page.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BASE_SEED = 1
LEARNING_RATE = 3e-3
WARMUP_FRACTION = 0.05
WEIGHT_DECAY = 0.01
BATCH_PAGES = 16  # about 3,000 tokens
BUCKET_BATCHES = 8  # batches that are cut from pages sorted by length, so that little is padded
IGNORED = -100


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int = BASE_SEED) -> LlamaForCausalLM:
    """A Llama of about 1M parameters with random weights."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            attn_implementation="sdpa",
        )
    )


def page_ids(tokenizer: PreTrainedTokenizerFast, pages: Sequence[str]) -> list[list[int]]:
    """Begin token, page, end token."""
    return [[*ids, tokenizer.eos_token_id] for ids in tokenizer(list(pages))["input_ids"]]


def _batch(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Right-padded `input_ids_BT` and `labels_BT`; padding is never a target."""
    longest = max(map(len, rows))
    input_ids_BT = torch.full((len(rows), longest), pad_id)
    labels_BT = torch.full((len(rows), longest), IGNORED)
    for at, ids in enumerate(rows):
        input_ids_BT[at, : len(ids)] = labels_BT[at, : len(ids)] = torch.tensor(ids)
    return input_ids_BT, labels_BT


def batches_of(pages: Sequence[list[int]], rng: random.Random) -> list[list[list[int]]]:
    """Batches of pages of like length, in shuffled order; every page once."""
    bucket = BATCH_PAGES * BUCKET_BATCHES
    batches = []
    for start in range(0, len(pages), bucket):
        alike = sorted(pages[start : start + bucket], key=len)
        batches += [alike[at : at + BATCH_PAGES] for at in range(0, len(alike), BATCH_PAGES)]
    rng.shuffle(batches)
    return batches


def learning_rate(step: int, num_steps: int) -> float:
    """Linear warm-up, then a cosine down to 0."""
    warmup = max(1, round(WARMUP_FRACTION * num_steps))
    if step < warmup:
        return LEARNING_RATE * (step + 1) / warmup
    done = (step - warmup) / max(1, num_steps - warmup)
    return LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * done))


def train_base(
    tokenizer: PreTrainedTokenizerFast,
    editions: Sequence[Sequence[str]],
    *,
    seed: int = BASE_SEED,
    report: Callable[[str], None] = print,
) -> LlamaForCausalLM:
    """Next-token training on every page of every edition, once each."""
    model = new_model(tokenizer, seed).train()
    rng = random.Random(seed)
    batches = [batch for pages in editions for batch in batches_of(page_ids(tokenizer, pages), rng)]
    num_tokens = sum(len(ids) for batch in batches for ids in batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY)
    report(f"base: {model.num_parameters():,} parameters, {num_tokens:,} tokens, {len(batches)} steps")
    for step, batch in enumerate(batches):
        input_ids_BT, labels_BT = _batch(batch, int(tokenizer.pad_token_id))
        optimizer.param_groups[0]["lr"] = learning_rate(step, len(batches))
        loss = model(input_ids=input_ids_BT, labels=labels_BT, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == len(batches) - 1:
            report(f"  step {step:4d}  loss {loss.item():.3f}")
    return model.eval()
