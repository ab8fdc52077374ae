"""Tiny random models of many families, float32, two layers, made on the spot."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from tunesmith.model.reward import finish_head

_ROPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GEMMA = _ROPE | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 6}
_MOE = _ROPE | {"num_local_experts": 4, "num_experts_per_tok": 2}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _ROPE,
    "qwen2": _ROPE,
    "qwen3": _ROPE | {"head_dim": 8},
    "mistral": _ROPE | {"sliding_window": 6},  # shorter than the rows
    "phi": _ROPE | {"num_key_value_heads": 4},
    "phi3": _ROPE | {"sliding_window": 7},
    "gemma2": _GEMMA | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    "gemma3_text": _GEMMA,
    "olmo2": _ROPE,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 96, "n_positions": 64},
    "gpt_neox": {key: value for key, value in _ROPE.items() if key != "num_key_value_heads"},
    "granite": _ROPE | {"logits_scaling": 4.0, "attention_multiplier": 0.3, "residual_multiplier": 0.7},
    "smollm3": _ROPE | {"no_rope_layers": [1, 0]},
    "cohere2": _ROPE | {"sliding_window": 6, "logit_scale": 0.25},
    "mixtral": _MOE,
}


def tiny_model(family: str, **changes: Any) -> PreTrainedModel:
    """A tiny random model; weights are drawn wide enough that log-probs differ from token to token."""
    torch.manual_seed(7)
    config = AutoConfig.for_model(family, **(FAMILIES.get(family, _ROPE) | changes))
    config.use_cache = True
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)
            elif "bias" in name:
                parameter.normal_(0, 0.1)
    return model.eval()


def tiny_reward_model(family: str, **changes: Any) -> PreTrainedModel:
    """The same body with a scalar head, drawn from a seed as a reward stage draws it."""
    body = tiny_model(family, **changes)
    body.config.num_labels = 1
    model: PreTrainedModel = AutoModelForSequenceClassification.from_config(body.config, dtype=torch.float32)
    model.base_model.load_state_dict(body.base_model.state_dict())
    finish_head(model, body.config, seed=5, where=family)
    return model.eval()
