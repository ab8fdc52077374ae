"""The models that are measured: their published shapes, their parameters and the arithmetic that they need.

In: a name. Out: a transformers config, parameter counts, floating-point operations. Must not know: torch, weights.
The values are those of each model's published config.json; the test holds the counts against the published ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from benchmarks.workload import EOS_ID, PAD_ID, Pair, answers_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

LORA_RANK, LORA_ALPHA = 16, 32
Quantization = Literal["none", "nf4"]


@dataclass(frozen=True)
class ModelShape:
    """A decoder: `llama` (no biases), `qwen2` (biases on queries, keys, values) or `phi` (biases everywhere)."""

    name: str
    kind: Literal["llama", "qwen2", "phi"]
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    tied: bool = False
    rope_theta: float = 10_000.0
    rope_factor: float | None = None  # of Llama 3's scaled rotary embedding
    positions: int = 2048

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads

    def linears(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of the linear layers of one block; each of them carries an adapter."""
        hidden, wide, kv = self.hidden, self.intermediate, self.kv_heads * self.head_size
        attention = [(hidden, hidden), (hidden, kv), (hidden, kv), (hidden, hidden)]
        ups = 1 if self.kind == "phi" else 2
        return [*attention, *[(hidden, wide)] * ups, (wide, hidden)]

    @property
    def linear_weights(self) -> int:
        """Weights of the blocks' linear layers, biases aside: what NF4 quantizes."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.linears())

    @property
    def adapter_weights(self) -> int:
        """Weights of a LoRA of rank LORA_RANK on all of them."""
        return self.layers * LORA_RANK * sum(inputs + outputs for inputs, outputs in self.linears())

    @property
    def num_parameters(self) -> int:
        """All parameters; tied matrices once."""
        kv = self.kv_heads * self.head_size
        biases = {"llama": 0, "qwen2": self.hidden + 2 * kv, "phi": sum(outputs for _, outputs in self.linears())}
        norms = 2 * self.hidden if self.kind == "phi" else self.hidden  # weight and bias, or weight
        block_norms = norms if self.kind == "phi" else 2 * norms  # Phi's attention and MLP share one
        head = 0 if self.tied else self.vocab * self.hidden + (self.vocab if self.kind == "phi" else 0)
        blocks = self.linear_weights + self.layers * (biases[self.kind] + block_norms)
        return self.vocab * self.hidden + blocks + norms + head

    def weight_gib(self, quantization: Quantization) -> float:
        """Memory of the weights: two bytes each, or NF4 with double quantization (4.127 bits) in the linear layers."""
        rest = self.num_parameters - self.linear_weights
        linear_bytes = self.linear_weights * (4.127 / 8 if quantization == "nf4" else 2)
        return (linear_bytes + 2 * rest) / 2**30

    def config(self) -> PreTrainedConfig:
        """The model's transformers config; ids of special tokens are the workload's."""
        from transformers import LlamaConfig, PhiConfig, Qwen2Config

        rope: dict[str, object] = {"rope_type": "default", "rope_theta": self.rope_theta}
        if self.rope_factor is not None:
            rope |= {"rope_type": "llama3", "factor": self.rope_factor, "low_freq_factor": 1.0}
            rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        common = {
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "intermediate_size": self.intermediate,
            "max_position_embeddings": self.positions,
            "tie_word_embeddings": self.tied,
            "bos_token_id": None,
            "eos_token_id": EOS_ID,
            "pad_token_id": PAD_ID,
            "use_cache": False,
        }
        if self.kind == "phi":
            rope["partial_rotary_factor"] = 0.4
            return PhiConfig(**common, rope_parameters=rope, partial_rotary_factor=0.4)
        return (LlamaConfig if self.kind == "llama" else Qwen2Config)(**common, rope_parameters=rope)

    def toy(self) -> ModelShape:
        """The same architecture, small enough for seconds on a CPU; groups of query heads stay grouped."""
        kv_heads = 4 if self.kv_heads == self.heads else 2
        return replace(self, hidden=64, layers=2, heads=4, kv_heads=kv_heads, intermediate=96, vocab=128)


SHAPES = {
    "llama-1b": ModelShape(
        "Llama-3.2-1B", "llama", 2048, 16, 32, 8, 8192, 128_256, True, 500_000.0, rope_factor=32.0, positions=131_072
    ),
    "phi-2": ModelShape("Phi-2", "phi", 2560, 32, 32, 32, 10_240, 51_200),
    "llama-8b": ModelShape(
        "Llama-3.1-8B", "llama", 4096, 32, 32, 8, 14_336, 128_256, False, 500_000.0, rope_factor=8.0, positions=131_072
    ),
    "qwen-7b": ModelShape(
        "Qwen2.5-7B", "qwen2", 3584, 28, 28, 4, 18_944, 152_064, False, 1_000_000.0, positions=131_072
    ),
    "qwen-14b": ModelShape(
        "Qwen2.5-14B", "qwen2", 5120, 48, 40, 8, 13_824, 152_064, False, 1_000_000.0, positions=131_072
    ),
}


def distinct_tokens(pairs: Sequence[Pair], method: str) -> int:
    """Each prompt once, each answer once."""
    return sum(len(pair.prompt) + sum(map(len, answers_of(pair, method))) for pair in pairs)


def useful_flops(pairs: Sequence[Pair], method: str, shape: ModelShape, *, reference: bool) -> float:
    """Floating-point operations that one pass of training over `pairs` needs; nothing that is computed twice counts.

    Per distinct token 4 N for the blocks' frozen weights (forward, and the gradient of their input) and 6 N for the
    adapters; the head's 4 N for tokens that predict a trained one; attention: each query with the keys that it may
    see, two products forward and four backward. `reference` adds its forward pass: 2 N, and two products.
    Recomputation, norms, activations and softmax are left out.
    """
    passes = 3 if reference else 2
    head = shape.vocab * shape.hidden
    total = 0.0
    for pair in pairs:
        answers, prompt = answers_of(pair, method), len(pair.prompt)
        answer_tokens = sum(map(len, answers))
        seen = prompt * (prompt + 1) / 2 + sum(prompt * len(row) + len(row) * (len(row) + 1) / 2 for row in answers)
        total += (prompt + answer_tokens) * (2 * shape.linear_weights * passes + 6 * shape.adapter_weights)
        total += answer_tokens * 2 * head * passes
        total += seen * 4 * shape.hidden * shape.layers * (passes + 1)  # backward has twice the products
    return total
