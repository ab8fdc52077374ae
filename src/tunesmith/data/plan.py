"""Which trees share a forest, and which examples make a step.

In: trees, sizes, a seed. Out: lists of indices; pure functions of their arguments, so that there is no
sampler state to save. Must not know: torch, files, what a tree holds besides its length.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from heapq import heapreplace

import numpy as np
import numpy.typing as npt

from tunesmith.data.store import Sizes, sizes_of
from tunesmith.data.types import Tree

Costs = npt.NDArray[np.int64]

SPAN = 16384
"""`attention_span` of a model of one or two thousand million weights. It only moves the balance, never a number, and
rows are mostly far shorter than it: a stage does not ask for its own model's."""
BALANCED_FORESTS = 256
"""Above so many forests, one that is nearly empty costs less than a hundredth of the whole, and balancing more."""
REPORTED_STEPS = 1000
"""Steps planned for a report: their mean fill is known to a thousandth."""

TRAIN_STREAM, REPLAY_STREAM = 0, 1  # so that replay is not drawn in the order of the examples


def attention_span(weights_per_layer: int, hidden_size: int) -> int:
    """Keys a query must see for its attention to cost as much as the rest of the layer does for its token.

    The rest is a multiplication and an addition a weight, 2 W a token; attention is 4 H a pair of query and key: 2 H
    for the score, 2 H for the weighted value. So W / 2H: 14,800 for Llama-3.2-1B, 26,600 for Llama-3.1-8B.
    """
    return max(1, weights_per_layer // (2 * hidden_size))


def tree_costs(sizes: Sizes, *, span: int = SPAN) -> Costs:
    """What every tree costs to compute, in pairs of query and key: whole numbers, so that sums have no rounding."""
    return span * sizes.num_tokens + sizes.num_pairs


def plan_forests(trees: Sequence[Tree], forest_tokens: int, *, span: int = SPAN) -> list[list[int]]:
    """Indices of the trees of each forest: as few as best-fit decreasing needs under the token budget, equally dear.

    A tree over the budget gets a forest of its own. Indices rise within a forest, and forests by their first index:
    the order is canonical. Trees of one size may change places, the order of `trees` changes nothing else.
    """
    sizes = sizes_of(trees)
    return _plan(sizes.num_tokens, tree_costs(sizes, span=span), forest_tokens)


def _plan(tokens: Costs, costs: Costs, forest_tokens: int) -> list[list[int]]:
    forests = _best_fit(tokens, np.lexsort((-costs, -tokens)), forest_tokens)
    balanced = _balanced(tokens, costs, forests, forest_tokens)
    return sorted(sorted(forest) for forest in balanced)


def _best_fit(tokens: Costs, order: Costs, forest_tokens: int) -> list[list[int]]:
    """Every tree in turn into the fullest forest that has room for it, or into a new one."""
    forests: list[list[int]] = []
    rooms: list[int] = []  # the tokens left in some forest, sorted, each number once
    forests_of: dict[int, list[int]] = {}  # by the tokens that are left in them
    for index, size in zip(order.tolist(), tokens[order].tolist(), strict=True):
        place = bisect_left(rooms, size)
        if place < len(rooms):
            left = rooms[place]
            forest = forests_of[left].pop()
            forests[forest].append(index)
            if not forests_of[left]:
                del rooms[place], forests_of[left]
        else:
            left, forest = forest_tokens, len(forests)
            forests.append([index])
        if left > size:
            if left - size not in forests_of:
                insort(rooms, left - size)
            forests_of.setdefault(left - size, []).append(forest)
    return forests


def _balanced(tokens: Costs, costs: Costs, forests: list[list[int]], forest_tokens: int) -> list[list[int]]:
    """The same trees in as many forests: the dearest first, each into the cheapest forest that has room for it.

    The forests as given where that finds no place for a tree, or makes the dearest forest dearer.
    """
    if not 1 < len(forests) <= BALANCED_FORESTS:
        return forests
    order = np.lexsort((-tokens, -costs)).tolist()
    size_of, cost_of = tokens.tolist(), costs.tolist()
    alone = [[index] for index in order if size_of[index] > forest_tokens]
    count = len(forests) - len(alone)
    filled: list[list[int]] = [[] for _ in range(count)]
    left, loads = [forest_tokens] * count, [0] * count
    for index in order:
        size = size_of[index]
        if size > forest_tokens:
            continue
        place = min((number for number in range(count) if left[number] >= size), key=loads.__getitem__, default=None)
        if place is None:
            return forests
        filled[place].append(index)
        left[place] -= size
        loads[place] += cost_of[index]
    dearest = max((sum(cost_of[index] for index in forest) for forest in forests if forest not in alone), default=0)
    return [*alone, *filled] if max(loads, default=0) <= dearest else forests


def deal(trees: Sequence[Tree], world_size: int, *, span: int = SPAN) -> list[list[int]]:
    """Indices of the trees of each rank: the dearest first, each to the rank that has least to do so far.

    Graham 1969: the busiest rank then has at most 4/3 of the work of the best possible sharing. Ties go by index.
    """
    sizes = sizes_of(trees)
    costs = tree_costs(sizes, span=span)
    shares: list[list[int]] = [[] for _ in range(world_size)]
    ranks = [(0, rank) for rank in range(world_size)]  # (cost so far, rank), a heap
    for index in np.lexsort((-sizes.num_tokens, -costs)).tolist():
        load, rank = ranks[0]
        shares[rank].append(index)
        heapreplace(ranks, (load + int(costs[index]), rank))
    return [sorted(share) for share in shares]


@dataclass(frozen=True, slots=True)
class PackingReport:
    """How full a stage's forests are. Shares are between 0 and 1; `imbalance` is a forest's cost over the mean of its
    step's, of the forest where that is largest; `num_alone` trees are over the budget."""

    num_steps: int
    num_forests: int
    forest_tokens: int
    fill: float
    saved: float
    imbalance: float
    num_alone: int = 0

    def line(self) -> str:
        """One line for the first lines of a run."""
        steps = f" in {self.num_steps:,} steps" if self.num_steps > 1 else ""
        shared = f", {self.saved:.0%} of the tokens saved by sharing prompts" if self.saved > 0 else ""
        alone = f", {self.num_alone:,} rows over it alone in theirs" if self.num_alone else ""
        return (
            f"packing: {self.num_forests:,} forests of up to {self.forest_tokens:,} tokens{steps}, "
            f"{self.fill:.0%} full{shared}{alone}; the dearest costs {self.imbalance:.2f} times the mean of its step"
        )


def packing_report(
    trees: Sequence[Tree], forest_tokens: int, *, batch_size: int | None = None, seed: int = 0, span: int = SPAN
) -> PackingReport:
    """What the plan of a stage comes to: of its first epoch's steps of `batch_size` examples, at most `REPORTED_STEPS`
    of them, or of one pass over all trees (a reference) where None. Reads sizes only.
    """
    sizes = sizes_of(trees)
    tokens, costs = sizes.num_tokens, tree_costs(sizes, span=span)
    steps = [np.arange(len(trees))]
    if batch_size is not None:
        planned = min(REPORTED_STEPS, num_steps(len(trees), batch_size, 1))
        steps = [np.array(step_examples(len(trees), batch_size, seed, step)) for step in range(planned)]
    room, num_forests, imbalance = 0, 0, 1.0
    for chosen in steps:
        forests = _plan(tokens[chosen], costs[chosen], forest_tokens)
        loads = [int(costs[chosen[forest]].sum()) for forest in forests]
        imbalance = max(imbalance, max(loads, default=0) * len(loads) / max(1, sum(loads)))
        room += sum(max(forest_tokens, int(tokens[chosen[forest]].sum())) for forest in forests)
        num_forests += len(forests)
    planned_trees = np.concatenate(steps)
    return PackingReport(
        num_steps=len(steps),
        num_forests=num_forests,
        forest_tokens=forest_tokens,
        fill=int(tokens[planned_trees].sum()) / max(1, room),
        saved=1 - int(tokens.sum()) / max(1, int(sizes.num_unshared.sum())),
        imbalance=imbalance,
        num_alone=int((tokens[planned_trees] > forest_tokens).sum()),
    )


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
