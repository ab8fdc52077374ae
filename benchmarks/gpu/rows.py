"""The rows that are measured: seeded pairs of random tokens in three kinds of length.

In: a kind, a number, a seed. Out: pairs of token ids. Must not know: torch, models, who trains them.

mixed: the CPU benchmark's (medians 200, 180 and 160 tokens, log-normal, at most 900 each). long: prompts of median
800, at most 1,200, the answers' medians 180 and 160, at most 400: every row fits 1,600 tokens. row1024: prompts and
answers of 512 tokens, so that prompt + answer is 1,024: the rows of the bars on memory.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from benchmarks.workload import EOS_ID, FIRST_WORD_ID, Pair, make_pairs

Kind = Literal["mixed", "long", "row1024"]
_LONG = ((800, 1200), (180, 400), (160, 400))  # (median, longest) of prompt, chosen, rejected


def make_rows(kind: Kind, num_pairs: int, *, seed: int, vocab_size: int, scale: float = 1.0) -> list[Pair]:
    """`scale` shrinks all lengths, for toy runs."""
    if kind == "mixed":
        return make_pairs(num_pairs, seed=seed, vocab_size=vocab_size, scale=scale)
    generator = np.random.default_rng(seed)

    def ids(length: int) -> list[int]:
        return [int(token) for token in generator.integers(FIRST_WORD_ID, vocab_size, length)]

    def length(median: int, longest: int) -> int:
        if kind == "row1024":
            return max(2, round(512 * scale))
        drawn = scale * median * math.exp(0.7 * generator.standard_normal())
        return max(2, min(round(drawn), round(longest * scale)))

    pairs = []
    for _ in range(num_pairs):
        prompt, chosen, rejected = (ids(length(*limits)) for limits in _LONG)
        pairs.append(Pair(prompt, [*chosen[:-1], EOS_ID], [*rejected[:-1], EOS_ID]))
    return pairs
