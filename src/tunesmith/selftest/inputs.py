"""What the proofs run on: small random models of three kinds, and random trees.

In: a kind, a device, a type. Out: models with the shapes that matter (grouped heads, norms on queries and keys, a
window shorter than the rows, capped scores), and trees of very unequal lengths. Must not know: what is proved.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from tunesmith.data.types import Branch, Tree
from tunesmith.model.adapters import add_adapter, inner_model
from tunesmith.recipe.models import Lora

Family = Literal["llama", "qwen3", "gemma2"]
FAMILIES: tuple[Family, ...] = ("llama", "qwen3", "gemma2")
"""Grouped heads; norms on queries and keys beside them; a window shorter than the rows and capped scores."""

VOCABULARY, HIDDEN, LAYERS = 96, 64, 2
HEADS, KEY_HEADS, HEAD_SIZE = 4, 2, 16  # 16: the least that FlexAttention takes
THETA, NORM_EPS = 10_000.0, 1e-6

# Prompt, branches, untrained tokens at each branch's start. Rows of 2 to 67 tokens, prompts of 1 to 60.
SHAPES = [
    (3, (9, 4), 0),
    (40, (2, 3), 0),
    (1, (1, 12), 0),
    (7, (20, 5), 2),
    (12, (3, 3), 1),
    (5, (31, 30), 0),
    (2, (4, 1), 0),
    (60, (7, 2), 0),
]


def _config(family: Family) -> PreTrainedConfig:
    values: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_HEADS,
        "head_dim": HEAD_SIZE,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 256,
        "rms_norm_eps": NORM_EPS,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if family == "gemma2":
        values |= {"query_pre_attn_scalar": HEAD_SIZE, "sliding_window": 6}
        values |= {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}
    config: PreTrainedConfig = AutoConfig.for_model(family, **values)
    return config


def small_model(
    family: Family, device: torch.device, dtype: torch.dtype = torch.float32, seed: int = 7
) -> PreTrainedModel:
    """A random model in eval mode, the same on every machine; all of its weights want a gradient."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            _config(family), dtype=torch.float32, trust_remote_code=False
        )
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(0, 0.1)  # wide enough that log-probs differ from token to token
    torch.nn.Module.to(model, device, dtype)
    model.eval()
    return model


def adapted_model(device: torch.device, *, dropout: float = 0.0) -> PreTrainedModel:
    """A Llama with an adapter that is not 0 any more; the adapter alone wants a gradient."""
    adapted: PeftModel = add_adapter(small_model("llama", device), Lora(r=4, dropout=dropout), seed=0)
    generator = torch.Generator().manual_seed(3)
    model = inner_model(adapted)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def random_tree(prompt_len: int, branch_lens: Sequence[int], *, seed: int, untrained: int = 0) -> Tree:
    """A tree of random ids; the first `untrained` tokens of every branch are not trained."""
    draw = np.random.default_rng([seed, prompt_len, len(branch_lens)])

    def ids(length: int) -> np.ndarray:
        return draw.integers(3, VOCABULARY, length).astype(np.int32)

    branches = tuple(Branch(ids(length), np.arange(length) >= untrained) for length in branch_lens)
    return Tree(f"tree-{seed}", ids(prompt_len), branches)


def pair_trees() -> list[Tree]:
    """Eight pairs on their prompts."""
    return [random_tree(*shape[:2], seed=seed, untrained=shape[2]) for seed, shape in enumerate(SHAPES)]


def answer_trees() -> list[Tree]:
    """The same prompts with the first answer alone."""
    return [Tree(tree.id, tree.prompt_ids, tree.branches[:1]) for tree in pair_trees()]


def text_trees() -> list[Tree]:
    """Texts without a prompt: the first token is marked as trained, and nothing can predict it."""
    return [random_tree(0, (length,), seed=100 + length) for length in (3, 17, 2, 40, 9, 5, 28, 11)]


def mixed_trees() -> list[Tree]:
    """Trees of one, two and four branches, and a text."""
    return [*pair_trees()[:3], answer_trees()[5], random_tree(21, (6, 1, 13, 9), seed=50), text_trees()[1]]


def foreign_references(trees: Sequence[Tree], num_read: Sequence[int]) -> list[np.ndarray]:
    """References of no model, so that margins are far from 0; `num_read` trained tokens for each tree."""
    draw = np.random.default_rng(5)
    return [(-3 * draw.random(count)).astype(np.float32) for _, count in zip(trees, num_read, strict=True)]
