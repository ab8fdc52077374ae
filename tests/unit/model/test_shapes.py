"""Weights' bytes from a configuration alone, against sums by hand for models of real sizes; no weight is made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.support.folders import make_tokenizer
from tunesmith.model.shapes import shapes_for_training
from tunesmith.recipe.models import Lora, Model

COMMON = {"max_position_embeddings": 2048, "eos_token_id": 2, "bos_token_id": 1}
CONFIGS: dict[str, dict[str, object]] = {
    "Phi-2": COMMON
    | {"model_type": "phi", "vocab_size": 51_200, "hidden_size": 2560, "intermediate_size": 10_240}
    | {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "partial_rotary_factor": 0.4}
    | {"tie_word_embeddings": False},
    "Llama-3.2-1B": COMMON
    | {"model_type": "llama", "vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192}
    | {"num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True},
    "Qwen2.5-14B": COMMON
    | {"model_type": "qwen2", "vocab_size": 152_064, "hidden_size": 5120, "intermediate_size": 13_824}
    | {"num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8, "tie_word_embeddings": False},
}

# (layers, matrices of a layer as outputs x inputs, other numbers of a layer, numbers outside the layers)
BY_HAND = {
    # biases: 4 of the attention, 10,240 + 2,560 of the rest; one norm with its bias. Embeddings, a head with a bias
    "Phi-2": (
        32,
        [(2560, 2560)] * 4 + [(10_240, 2560), (2560, 10_240)],
        4 * 2560 + 10_240 + 2560 + 2 * 2560,
        2 * 51_200 * 2560 + 51_200 + 2 * 2560,
    ),
    # no bias, two norms; tied embeddings count once
    "Llama-3.2-1B": (
        16,
        [(2048, 2048)] * 2 + [(512, 2048)] * 2 + [(8192, 2048)] * 2 + [(2048, 8192)],
        2 * 2048,
        128_256 * 2048 + 2048,
    ),
    # biases of queries, keys and values; two norms
    "Qwen2.5-14B": (
        48,
        [(5120, 5120)] * 2 + [(1024, 5120)] * 2 + [(13_824, 5120)] * 2 + [(5120, 13_824)],
        5120 + 2 * 1024 + 2 * 5120,
        2 * 152_064 * 5120 + 5120,
    ),
}
NUM_BUFFERS = {"Phi-2": 32 // 2, "Llama-3.2-1B": 64 // 2, "Qwen2.5-14B": 128 // 2}
"""Frequencies of the rotary embedding: half of the turned dimensions, held twice, in float32."""


@pytest.fixture(params=sorted(CONFIGS))
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    target = tmp_path / request.param
    make_tokenizer().save_pretrained(target)
    (target / "config.json").write_text(json.dumps(CONFIGS[request.param]))
    return target


def test_real_models_in_bfloat16(folder: Path) -> None:
    layers, matrices, rest, outside = BY_HAND[folder.name]
    count = layers * (sum(rows * columns for rows, columns in matrices) + rest) + outside
    weights = shapes_for_training(Model(path=str(folder)), Lora(r=16), dtype=torch.bfloat16).weights
    assert weights.num_frozen == count
    assert weights.frozen == 2 * count + 2 * 4 * NUM_BUFFERS[folder.name]
    assert weights.num_trained == layers * sum(16 * (rows + columns) for rows, columns in matrices)
    assert weights.trained == 4 * weights.num_trained
    assert weights.dequantized == 0


def test_real_models_in_four_bits(folder: Path) -> None:
    layers, matrices, rest, outside = BY_HAND[folder.name]
    weights = shapes_for_training(Model(path=str(folder), quantization="nf4"), Lora(r=16), dtype=torch.bfloat16).weights
    quantized = 0
    for rows, columns in matrices:
        blocks = rows * columns / 64  # a scale of a byte each; a float32 for 256 of them; three small tables
        quantized += rows * columns / 2 + blocks + 4 * blocks / 256 + 4 * 273
    kept = layers * rest + outside
    assert weights.frozen == layers * quantized + 2 * kept + 2 * 4 * NUM_BUFFERS[folder.name]
    assert weights.dequantized == 2 * max(rows * columns for rows, columns in matrices)
