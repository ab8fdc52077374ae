"""TRAPS 5-7, 61, 67 and promises R5, R6: two ranks compute what one does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.multiprocessing as mp

from tests.support.ranks import cases, compute, rank_main, read
from tests.support.training import MACHINE, answer_trees, assert_gradients_equal, full_engine, pair_trees
from tunesmith.data.plan import deal
from tunesmith.objectives import supervised
from tunesmith.runs.records import Record, read_records
from tunesmith.train.evaluate import evaluate
from tunesmith.train.step import Batch


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, Path]]:
    """Results of one process and of two, by number of ranks."""
    found = {number: tmp_path_factory.mktemp(f"world-{number}") for number in (1, 2)}
    compute(MACHINE, found[1])
    mp.spawn(rank_main, args=(2, found[2]), nprocs=2)
    yield found


@pytest.mark.parametrize("name", cases())
def test_gradients_losses_and_metrics_equal_one_process(folders: dict[int, Path], name: str) -> None:
    expected_figures, expected = read(folders[1], name)
    figures, found = read(folders[2], name)
    assert_gradients_equal(found, expected)
    assert figures.keys() == expected_figures.keys()
    for key, value in expected_figures.items():
        assert figures[key] == pytest.approx(value, rel=1e-6, abs=1e-7), key


def test_the_unequal_case_is_one_row_a_rank() -> None:
    batch, _ = cases()["5 and 100 trained tokens"]
    assert deal(batch.trees, 2) == [[0], [1]]
    assert [tree.num_trained for tree in batch.trees] == [5, 100]


def test_stage_on_two_ranks_has_the_same_records(folders: dict[int, Path]) -> None:
    one, two = (read_records(folders[number] / "stage" / "metrics.jsonl") for number in (1, 2))
    assert [record["step"] for record in two] == list(range(1, 7))  # one record a step, not one a rank
    assert_close(two, one)
    assert_close(*(read_records(folders[number] / "stage" / "eval.jsonl") for number in (2, 1)))


def assert_close(found: list[Record], expected: list[Record]) -> None:
    assert len(found) == len(expected)
    for record, wanted in zip(found, expected, strict=True):
        # the first differences of a rounding grow with the steps
        assert {key: pytest.approx(value, rel=1e-5) for key, value in wanted.items()} == record


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 2, 7, 13])
def test_every_row_is_dealt_to_exactly_one_rank(world_size: int, count: int) -> None:
    shares = deal(pair_trees(count), world_size)
    assert len(shares) == world_size
    assert sorted(index for share in shares for index in share) == list(range(count))


def test_dealing_balances_tokens() -> None:
    trees = pair_trees(13)
    loads = [sum(trees[index].num_tokens for index in share) for share in deal(trees, 2)]
    assert max(loads) - min(loads) < 20


def test_evaluation_is_sum_over_count_for_every_budget() -> None:
    """TRAPS 7: batches of one row, of a few, of all."""
    trees = answer_trees(8)
    engine = full_engine()
    rows = [engine.logprobs([tree]).logprob_N.double() for tree in trees]
    expected = -sum(float(row.sum().detach()) for row in rows) / sum(len(row) for row in rows)
    for forest_tokens in (1, 60, 120, 10_000):
        found = evaluate(
            engine, Batch(trees), objective=supervised("sft"), forest_tokens=forest_tokens, machine=MACHINE
        )
        assert found["loss"] == pytest.approx(expected, rel=1e-6)
        assert found["num_trained"] == sum(len(row) for row in rows)
