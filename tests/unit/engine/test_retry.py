from __future__ import annotations

import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch

from tests.support.memory import ERRORS
from tests.support.trees import random_tree
from tunesmith.data.types import Tree
from tunesmith.engine.retry import Budget, is_out_of_memory, longest_row, memory_problem, with_retry
from tunesmith.errors import ResourceError

CPU = torch.device("cpu")

# tokens 10 + 20 + 30 = 60 (rows 30, 40); 5 + 7 = 12; 1 + 2 + 3 + 4 = 10 (rows 3, 4, 5)
SHAPES = [(10, (20, 30)), (5, (7,)), (1, (2, 3, 4))]
TREES = [random_tree(prompt, branches, vocabulary=96, seed=n) for n, (prompt, branches) in enumerate(SHAPES)]


def described(budget: Budget, trees: list[Tree] = TREES) -> list[list[tuple[int, int | None, int]]]:
    return [[(unit.index, unit.branch, unit.tree.num_tokens) for unit in forest] for forest in budget.plan(trees)]


def test_whole_trees_are_planned_as_ever() -> None:
    assert described(Budget(100)) == [[(0, None, 60), (1, None, 12), (2, None, 10)]]
    assert described(Budget(60)) == [[(0, None, 60)], [(1, None, 12), (2, None, 10)]]


def test_a_tree_above_the_limit_goes_branch_by_branch() -> None:
    """Rows of 30 and 40 tokens; the others are whole. A tree of one branch is never split."""
    assert described(Budget(45, 45)) == [[(1, None, 12), (2, None, 10)], [(0, 0, 30)], [(0, 1, 40)]]
    assert described(Budget(1, 1))[0] == [(1, None, 12)]


def test_a_unit_of_one_branch_holds_that_branch_behind_the_prompt() -> None:
    units = [unit for forest in Budget(1, 20).plan(TREES) for unit in forest if unit.index == 0]
    assert [unit.tree.branches for unit in units] == [(branch,) for branch in TREES[0].branches]
    assert all(unit.tree.prompt_ids is TREES[0].prompt_ids for unit in units)


def test_lowering_by_hand() -> None:
    """82 tokens fit in one forest of 1,000; half of what was used is 41, but the largest tree has 60. Then trees of
    more than 40 (the longest row; half of 60 is 30) are split, and then nothing is left to do."""
    steps = [Budget(1000)]
    while (smaller := steps[-1].lowered(TREES)) is not None:
        steps.append(smaller)
    assert steps == [Budget(1000), Budget(60), Budget(40, 40)]


def test_one_tree_alone_is_split_at_once() -> None:
    assert Budget(1000).lowered(TREES[:1]) == Budget(40, 40)
    assert Budget(1000).lowered(TREES[1:2]) is None


def test_smaller_of_two() -> None:
    assert Budget(10).smaller_of(Budget(20, 15)) == Budget(10, 15)
    assert Budget(10, 3).smaller_of(Budget(5, 15)) == Budget(5, 3)
    assert Budget(10).smaller_of(Budget(20)) == Budget(10)


@pytest.mark.parametrize("make", ERRORS.values())
def test_what_allocators_say(make: Callable[[], Exception]) -> None:
    assert is_out_of_memory(make())
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of memory"))


@pytest.mark.parametrize("allocate", [torch.empty, np.empty])
def test_what_the_allocators_of_this_machine_say(allocate: Callable[[int], object]) -> None:
    """More than a process can address, so that it fails everywhere."""
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        allocate(2**56)
    assert is_out_of_memory(caught.value)


class Large:
    """Stands for a forest's tensors."""


def test_what_the_failed_work_held_is_let_go() -> None:
    held: list[weakref.ref[Large]] = []

    def work() -> None:
        tensors = Large()
        held.append(weakref.ref(tensors))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")

    assert memory_problem(work) == "CUDA out of memory. Tried to allocate 2 GiB."
    assert held[0]() is None


def test_work_is_done_again_until_it_fits() -> None:
    """At the time of the retry nothing of the failed try is left."""
    held: list[weakref.ref[Large]] = []
    said: list[tuple[Budget, str]] = []

    def work(budget: Budget) -> int:
        assert all(reference() is None for reference in held)
        tensors = Large()
        held.append(weakref.ref(tensors))
        if budget.forest_tokens > 40:
            raise MemoryError
        return budget.forest_tokens

    def lowered(budget: Budget, problem: str) -> None:
        said.append((budget, problem))

    assert with_retry(work, TREES, budget=Budget(1000), device=CPU, where="here", lowered=lowered) == 40
    assert said == [(Budget(60), "MemoryError"), (Budget(40, 40), "MemoryError")]


def test_where_nothing_fits_the_error_says_what_to_set() -> None:
    def work(budget: Budget) -> None:
        raise MemoryError

    with pytest.raises(ResourceError, match=r"here: a single answer does not fit in memory \(MemoryError\)") as caught:
        with_retry(work, TREES, budget=Budget(1000), device=CPU, where="here", lowered=lambda *_: None)
    assert longest_row(TREES) == (TREES[0].id, 40)
    assert f"the longest row, {TREES[0].id}, has 40 tokens, and the peak was" in caught.value.what
    assert caught.value.remedy.startswith("Set `max_length: 20`")


def test_other_errors_pass() -> None:
    def work(budget: Budget) -> None:
        raise RuntimeError("shapes")

    with pytest.raises(RuntimeError, match="shapes"):
        with_retry(work, TREES, budget=Budget(1), device=CPU, where="", lowered=lambda *_: None)
