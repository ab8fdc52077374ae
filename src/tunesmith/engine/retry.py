"""When memory runs out: what was begun is dropped and done again in smaller forests, down to single answers.

In: work that takes a token budget, and its trees. Out: what the work returns, and the budget that it fitted in.
Must not know: objectives, optimizers, files.

Splitting never changes which tokens are computed, so log-probs and gradients stay the same to rounding. A tree that
does not fit alone goes branch by branch, each behind the prompt again.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch

from tunesmith.data.plan import plan_forests
from tunesmith.data.store import Sizes, sizes_of
from tunesmith.data.types import Tree
from tunesmith.errors import ResourceError
from tunesmith.model.machine import peak_bytes

Found = TypeVar("Found")

_GIB = 2**30

_SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")
"""What allocators say that raise a plain RuntimeError: torch's on a CPU, CUDA's libraries, Apple's."""


class MemoryFullError(ResourceError):
    """Memory ran out, here or on another rank; what was begun is dropped, and nothing was changed."""


@dataclass(frozen=True, slots=True, eq=False)
class Unit:
    """What a forest takes whole: the tree number `index`, or one `branch` of it behind the prompt, as a tree."""

    index: int
    branch: int | None
    tree: Tree


@dataclass(frozen=True, slots=True)
class Budget:
    """How large a forest may be. A tree above `tree_tokens` goes branch by branch; None: every tree stays whole."""

    forest_tokens: int
    tree_tokens: int | None = None

    def plan(self, trees: Sequence[Tree]) -> list[list[Unit]]:
        """The forests of `trees` in a canonical order: those of whole trees, then those of single branches."""
        if self.tree_tokens is None:
            return [[Unit(i, None, trees[i]) for i in forest] for forest in plan_forests(trees, self.forest_tokens)]
        is_split = self._is_split(sizes_of(trees))
        whole = [Unit(i, None, trees[i]) for i in np.flatnonzero(~is_split).tolist()]
        single = [
            Unit(i, number, replace(trees[i], branches=(branch,)))
            for i in np.flatnonzero(is_split).tolist()
            for number, branch in enumerate(trees[i].branches)
        ]
        forests = []
        for units in (whole, single):
            plan = plan_forests([unit.tree for unit in units], self.forest_tokens) if units else []
            forests += [[units[i] for i in forest] for forest in plan]
        return forests

    def splits(self, trees: Sequence[Tree]) -> bool:
        """Whether any of `trees` goes branch by branch."""
        return self.tree_tokens is not None and bool(self._is_split(sizes_of(trees)).any())

    def lowered(self, trees: Sequence[Tree]) -> Budget | None:
        """The next smaller budget, given that `trees` did not fit in this one; None where every row is alone.

        First forests of half the tokens, down to the largest tree; then trees in branches, down to the longest row.
        """
        sizes = sizes_of(trees)
        largest = int(np.where(self._is_split(sizes), sizes.longest_row, sizes.num_tokens).max())
        if self.forest_tokens > largest and len(trees) > 1:
            used = min(self.forest_tokens, int(sizes.num_tokens.sum()))
            return replace(self, forest_tokens=max(used // 2, largest))
        row = int(sizes.longest_row.max())
        if largest == row:
            return None
        tree_tokens = max(largest // 2, row)
        return Budget(min(self.forest_tokens, tree_tokens), tree_tokens)

    def smaller_of(self, other: Budget) -> Budget:
        """The smaller of both limits."""
        limits = [limit for limit in (self.tree_tokens, other.tree_tokens) if limit is not None]
        return Budget(min(self.forest_tokens, other.forest_tokens), min(limits, default=None))

    def described(self) -> str:
        """In words, for the log."""
        if self.tree_tokens is None:
            return f"micro-batches of {self.forest_tokens} tokens"
        return f"micro-batches of {self.forest_tokens} tokens, rows over {self.tree_tokens} one answer at a time"

    def _is_split(self, sizes: Sizes) -> np.ndarray:
        """Which trees go branch by branch, bool; a tree of one branch is as small as it can be."""
        if self.tree_tokens is None:
            return np.zeros(len(sizes.num_tokens), bool)
        return np.asarray((sizes.num_tokens > self.tree_tokens) & (sizes.num_tokens > sizes.longest_row))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator refused: CUDA's, the CPU's, Python's."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError | MemoryFullError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def memory_problem(work: Callable[[], None]) -> str | None:
    """Run `work`; what the allocator said where memory ran out, None where it did not. Other errors pass.

    When it returns, nothing of the work is held any more: its tensors lived in the traceback's frames.
    """
    try:
        work()
        return None
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        problem = _first_line(error)
    free_memory()
    return problem


def free_memory() -> None:
    """Give back what nothing refers to: cycles of Python's, and the blocks that torch keeps for later."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def with_retry(
    work: Callable[[Budget], Found],
    trees: Sequence[Tree],
    *,
    budget: Budget,
    device: torch.device,
    where: str,
    lowered: Callable[[Budget, str], None],
    can_recompute: bool = False,
) -> Found:
    """What `work` returns under `budget`, or under the first smaller one that it fits in.

    `work` must leave nothing half done, or be able to go on where it broke off. `lowered(budget, problem)` is called
    before each retry. Raises ResourceError, with what to set, where a single answer does not fit; `can_recompute`:
    gradient checkpointing would help and is not on yet.
    """
    while True:
        try:
            return work(budget)
        except (RuntimeError, MemoryError, MemoryFullError) as error:
            if not is_out_of_memory(error):
                raise
            problem = error.what if isinstance(error, MemoryFullError) else _first_line(error)
        free_memory()  # only here is the error, and with it the forest's tensors, let go
        smaller = budget.lowered(trees)
        if smaller is None:
            raise _no_room(trees, problem, device=device, where=where, can_recompute=can_recompute)
        lowered(smaller, problem)
        budget = smaller


def longest_row(trees: Sequence[Tree]) -> tuple[str, int]:
    """Id and tokens of the longest prompt + answer."""
    rows = sizes_of(trees).longest_row
    index = int(rows.argmax())
    return trees[index].id, int(rows[index])


def _no_room(
    trees: Sequence[Tree], problem: str, *, device: torch.device, where: str, can_recompute: bool
) -> ResourceError:
    name, tokens = longest_row(trees)
    what = (
        f"a single answer does not fit in memory ({problem}); the longest row, {name}, has {tokens} tokens, and the "
        f"peak was {peak_bytes(device) / _GIB:.2f} GiB"
    )
    recompute = "`gradient_checkpointing: full`, or " if can_recompute else ""
    remedy = f"Set {recompute}`max_length: {max(2, tokens // 2)}`, or take a smaller model or `quantization: nf4`."
    return ResourceError(what, where=where, remedy=remedy)


def _first_line(error: BaseException) -> str:
    """What was said, in short: torch's CPU allocator begins with a place in its own source."""
    text = (str(error) or type(error).__name__).splitlines()[0]
    return text.rpartition("DefaultCPUAllocator: ")[2][:200]
