"""What both sides are measured on: a model's shape, seeded pairs, and the arithmetic that they need.

In: sizes and a seed. Out: token ids, and floating-point operations counted from shapes alone.
Must not know: torch, Tunesmith, TRL. Both virtual environments import this file.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

PAD_ID, UNKNOWN_ID, EOS_ID, FIRST_WORD_ID = 0, 1, 2, 3
METHODS = ("dpo", "sft")


@dataclass(frozen=True)
class Task:
    """What is trained and against what: the part of a case that the arithmetic depends on.

    reference: `loop`, computed inside the timed window; `cached`, before it; `none`, the method has none.
    """

    method: Literal["dpo", "sft"]
    tuning: Literal["lora", "full"] = "lora"
    reference: Literal["loop", "cached", "none"] = "none"


@dataclass(frozen=True)
class Shape:
    """A Llama with tied embeddings, and the rank of the adapters on all its linear layers."""

    hidden_size: int = 512
    num_layers: int = 8
    num_heads: int = 8
    num_kv_heads: int = 4
    intermediate_size: int = 1408
    vocab_size: int = 32_000
    lora_rank: int = 16

    def linears(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of the linear layers of one block; each of them carries an adapter."""
        hidden, wide = self.hidden_size, self.intermediate_size
        kv_size = hidden * self.num_kv_heads // self.num_heads
        attention = [(hidden, hidden), (hidden, kv_size), (hidden, kv_size), (hidden, hidden)]
        return [*attention, (hidden, wide), (hidden, wide), (wide, hidden)]


@dataclass(frozen=True)
class Pair:
    """Token ids of a prompt and its two answers; both answers end with EOS_ID, and no other token is special."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


@dataclass(frozen=True)
class Workload:
    """All that the workers must agree on. Written once to `workload.json`, read by every measurement."""

    pairs: list[Pair]
    pairs_per_step: int = 16
    num_threads: int = 2
    seed: int = 0
    learning_rate: float = 1e-4  # constant on both sides: far from zero, so that later losses prove equal updates
    beta: float = 0.1
    max_grad_norm: float = 1.0
    lora_alpha: int = 32
    shape: Shape = field(default_factory=Shape)

    @property
    def num_steps(self) -> int:
        """Optimizer steps; the pairs are taken in their order, each once."""
        return len(self.pairs) // self.pairs_per_step

    def save(self, path: Path) -> None:
        """Write as JSON."""
        path.write_text(json.dumps(asdict(self)))


def load_workload(path: Path) -> Workload:
    """Read what `Workload.save` wrote."""
    values = json.loads(path.read_text())
    values["pairs"] = [Pair(**pair) for pair in values["pairs"]]
    values["shape"] = Shape(**values["shape"])
    return Workload(**values)


def make_pairs(num_pairs: int, *, seed: int, vocab_size: int, scale: float = 1.0) -> list[Pair]:
    """Random pairs whose lengths are log-normal: medians 200, 180 and 160 tokens, sigma 0.7, at most 900 each.

    `scale` shrinks medians and cap for toy runs. Tokens are uniform, so their values cannot matter to the speed.
    """
    generator = np.random.default_rng(seed)

    def ids(median: float, least: int) -> list[int]:
        drawn = scale * median * math.exp(0.7 * generator.standard_normal())
        length = max(least, min(round(drawn), round(900 * scale)))
        return [int(token) for token in generator.integers(FIRST_WORD_ID, vocab_size, length)]

    pairs = []
    for _ in range(num_pairs):
        prompt, chosen, rejected = ids(200, 4), ids(180, 2), ids(160, 2)
        pairs.append(Pair(prompt, [*chosen[:-1], EOS_ID], [*rejected[:-1], EOS_ID]))
    return pairs


def make_rows(num_rows: int, num_tokens: int, *, seed: int, vocab_size: int) -> list[Pair]:
    """Rows of exactly `num_tokens` tokens for SFT: half prompt, half answer; the other answer is not used."""
    generator = np.random.default_rng(seed)

    def ids(length: int) -> list[int]:
        return [int(token) for token in generator.integers(FIRST_WORD_ID, vocab_size, length)]

    half = num_tokens // 2
    return [Pair(ids(half), [*ids(num_tokens - half - 1), EOS_ID], [EOS_ID]) for _ in range(num_rows)]


def answers_of(pair: Pair, method: str) -> list[list[int]]:
    """The answers that a method trains: both of a pair, or the chosen one alone."""
    return [pair.chosen, pair.rejected] if method == "dpo" else [pair.chosen]


def useful_tokens(pairs: list[Pair], method: str) -> int:
    """Distinct tokens: each prompt once, each answer once."""
    return sum(len(pair.prompt) + sum(map(len, answers_of(pair, method))) for pair in pairs)


def padded_tokens(pairs: list[Pair], method: str, batch_size: int) -> int:
    """Positions that a padded batch of prompt + answer rows computes: the prompt once an answer, and the padding."""
    total = 0
    for start in range(0, len(pairs), batch_size):
        batch = pairs[start : start + batch_size]
        rows = [len(pair.prompt) + len(answer) for pair in batch for answer in answers_of(pair, method)]
        total += len(rows) * max(rows)
    return total


def useful_flops(pairs: list[Pair], task: Task, shape: Shape) -> float:
    """Floating-point operations that the task needs, two for a multiply-add; waste of any kind is not counted.

    Per distinct token and weight of the blocks: 2 forward, 2 backward to the input, and 2 for the weight's own
    gradient where it is trained: 4N with LoRA, 6N in full; adapters 6N. LM head the same, on answer tokens only;
    the embedding's lookup is free. Attention: each query with the keys that it may see, two products forward and four
    backward. A reference in the loop adds one forward pass, without adapters. Recomputation, norms, activations,
    softmax and the optimizer are left out.
    """
    blocks = shape.num_layers * sum(inputs * outputs for inputs, outputs in shape.linears())
    adapters = shape.num_layers * shape.lora_rank * sum(inputs + outputs for inputs, outputs in shape.linears())
    head = shape.vocab_size * shape.hidden_size
    reference = 1 if task.reference == "loop" else 0
    per_weight = (4 if task.tuning == "lora" else 6) + 2 * reference
    per_token = per_weight * blocks + (6 * adapters if task.tuning == "lora" else 0)
    total = 0.0
    for pair in pairs:
        answers = answers_of(pair, task.method)
        answer_tokens = sum(map(len, answers))
        prompt = len(pair.prompt)
        seen = prompt * (prompt + 1) / 2 + sum(prompt * len(row) + len(row) * (len(row) + 1) / 2 for row in answers)
        total += (prompt + answer_tokens) * per_token
        total += answer_tokens * per_weight * head
        total += seen * 4 * shape.hidden_size * shape.num_layers * (3 + reference)  # backward: twice the products
    return total


def peak_rss_gib() -> float:
    """The most memory that this process ever held, GiB.

    VmHWM and not ru_maxrss: the latter is inherited through fork and exec, so it can show the parent's peak.
    """
    return _status_gib("VmHWM")


def rss_gib() -> float:
    """The memory that this process holds now, GiB."""
    return _status_gib("VmRSS")


def _status_gib(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 2**20
    raise RuntimeError(f"/proc/self/status has no {key}; the benchmark measures memory on Linux only")
