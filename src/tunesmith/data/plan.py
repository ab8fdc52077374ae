"""Which trees share a forest, and which examples make a step.

In: trees, sizes, a seed. Out: lists of indices; pure functions of their arguments, so that there is no
sampler state to save. Must not know: torch, files, what a tree holds besides its length.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from tunesmith.data.store import sizes_of
from tunesmith.data.types import Tree

TRAIN_STREAM, REPLAY_STREAM = 0, 1  # so that replay is not drawn in the order of the examples


def plan_forests(trees: Sequence[Tree], forest_tokens: int) -> list[list[int]]:
    """Indices of the trees of each forest: best-fit decreasing under the token budget.

    A tree over the budget gets a forest of its own. Indices rise within a forest, and forests by their
    first index: the order is canonical.
    """
    forests: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, forest), sorted
    sizes = sizes_of(trees).num_tokens
    for index in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[index])
        place = bisect_left(room, (size, -1))
        if place < len(room):
            left, forest = room.pop(place)
            forests[forest].append(index)
        else:
            left, forest = forest_tokens, len(forests)
            forests.append([index])
        if left > size:
            insort(room, (left - size, forest))
    return sorted(sorted(forest) for forest in forests)


def deal(trees: Sequence[Tree], world_size: int) -> list[list[int]]:
    """Indices of the trees of each rank: the longest first, each to the rank with the fewest tokens so far."""
    shares: list[list[int]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for index in sorted(range(len(trees)), key=lambda index: (-trees[index].num_tokens, index)):
        rank = loads.index(min(loads))
        shares[rank].append(index)
        loads[rank] += trees[index].num_tokens
    return [sorted(share) for share in shares]


def num_steps(num_examples: int, batch_size: int, epochs: int) -> int:
    """Steps of all epochs; the last step of an epoch may be short, none is empty."""
    return epochs * -(-num_examples // batch_size)


def step_examples(num_examples: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Indices of the examples of a step (counted from 0): every example once an epoch, reshuffled each epoch."""
    epoch, place = divmod(step, num_steps(num_examples, batch_size, 1))
    order = _order(num_examples, seed, epoch, TRAIN_STREAM)
    return [int(i) for i in order[place * batch_size : (place + 1) * batch_size]]


def replay_examples(num_replay: int, per_step: int, seed: int, step: int) -> list[int]:
    """Indices of the replay rows of a step: an endless stream, reshuffled each time that it is used up."""
    places = range(step * per_step, (step + 1) * per_step)
    return [int(_order(num_replay, seed, place // num_replay, REPLAY_STREAM)[place % num_replay]) for place in places]


@lru_cache(maxsize=4)
def _order(count: int, seed: int, epoch: int, stream: int) -> npt.NDArray[np.int64]:
    """A permutation that depends on its arguments alone, for ever: no library's generator is behind it.

    Sorting by hash: indices go through the finalizer of splitmix64 (Steele et al. 2014), keyed.
    """
    key = _mix(np.array([seed & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64))
    for number in (epoch, stream):
        key = _mix(np.add(key, np.uint64(number), dtype=np.uint64))
    return np.argsort(_mix(np.add(key, np.arange(count, dtype=np.uint64), dtype=np.uint64)), kind="stable")


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = x + np.uint64(0x9E3779B97F4A7C15)  # array arithmetic wraps around, which is meant
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
