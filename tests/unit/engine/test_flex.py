"""FlexAttention's block mask against the rule told token by token; its values are in tests/parity."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support.flash import spans
from tunesmith.engine import flex
from tunesmith.engine.forest import TreeSpan
from tunesmith.engine.layout import ForestLayout

FOREST = spans((150, (70, 40, 1)), (0, (30, 90)), (1, (1,)), (20, (25, 140)), (60, (200,)))
SMALL = spans((3, (2, 1, 4)), (0, (3, 2)), (2, (1,)))


def _allowed(forest: list[TreeSpan], window: int | None) -> np.ndarray:
    """Which key each query sees, one by one."""
    rows = [
        (tree, branch, place)
        for tree, span in enumerate(forest)
        for branch, length in enumerate((span.prompt_len, *span.branch_lens))
        for place in (range(length) if branch == 0 else range(span.prompt_len, span.prompt_len + length))
    ]
    allowed = np.zeros((len(rows), len(rows)), np.bool_)
    for query, (tree, branch, place) in enumerate(rows):
        for key, (other_tree, other_branch, other_place) in enumerate(rows):
            related = tree == other_tree and other_branch in (0, branch)
            behind = place - other_place
            allowed[query, key] = related and behind >= 0 and (window is None or behind < window)
    return allowed


def _tokens_and_blocks(forest: list[TreeSpan], window: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    layout = ForestLayout(forest, "flex")
    mask = flex.block_mask(layout, window, torch.device("cpu"))
    length = mask.seq_lengths[0]
    index = torch.arange(length)
    seen = mask.mask_mod(torch.zeros(()), torch.zeros(()), index[:, None], index[None, :]).numpy()
    some, whole = flex.visible_blocks(*flex._stops_and_positions(layout), window)
    return seen, some, whole


@pytest.mark.parametrize("window", [None, 5])
def test_tokens_see_their_prompt_and_their_own_branch(window: int | None) -> None:
    seen, _, _ = _tokens_and_blocks(SMALL, window)
    num_tokens = SMALL[-1].stop
    assert np.array_equal(seen[:num_tokens, :num_tokens], _allowed(SMALL, window))
    assert not seen[:num_tokens, num_tokens:].any()
    assert seen[num_tokens:].any(1).all()  # the padding sees itself: no row is empty
    assert not seen[num_tokens:, :num_tokens].any()


@pytest.mark.parametrize("window", [None, 40, 130])
def test_blocks_are_exactly_those_of_the_tokens(window: int | None) -> None:
    seen, some, whole = _tokens_and_blocks(FOREST, window)
    blocks = seen.reshape(len(some), flex.BLOCK, len(some), flex.BLOCK)
    assert not (blocks.any((1, 3)) & ~some).any()  # nothing visible is skipped
    assert not (whole & ~blocks.all((1, 3))).any()  # nothing hidden is taken whole
    if window is None:
        assert np.array_equal(some, blocks.any((1, 3)))
        assert np.array_equal(whole, blocks.all((1, 3)))
        assert whole.any()


def test_the_mask_holds_the_blocks_by_number() -> None:
    mask = flex.block_mask(ForestLayout(FOREST, "flex"), None, torch.device("cpu"))
    _, some, whole = _tokens_and_blocks(FOREST, None)
    dense = mask.to_dense()[0, 0].numpy().astype(np.bool_)
    assert np.array_equal(dense, some)
    assert mask.full_kv_num_blocks is not None
    assert mask.full_kv_num_blocks[0, 0].tolist() == whole.sum(1).tolist()


def test_a_mask_is_made_once_a_forest_and_window() -> None:
    layout = ForestLayout(SMALL, "flex")
    cpu = torch.device("cpu")
    assert flex.block_mask(layout, 4, cpu) is flex.block_mask(layout, 4, cpu)
    assert flex.block_mask(layout, 4, cpu) is not flex.block_mask(layout, None, cpu)


@pytest.mark.parametrize(("tokens", "padded"), [(1, 256), (256, 256), (257, 384), (1000, 1024)])
def test_lengths_are_whole_blocks(tokens: int, padded: int) -> None:
    assert flex.padded_length(tokens) == padded
