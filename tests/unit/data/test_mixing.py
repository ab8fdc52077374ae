from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.data.mixing import drawn_rows, interleaved, shares


def test_the_shortest_source_for_its_weight_is_drawn_whole() -> None:
    # 100 rows at 0.25 allow an epoch of 400; of the other source 0.75 * 400 = 300 are wanted.
    assert shares([100, 1000], [0.25, 0.75]) == [100, 300]
    assert shares([100, 1000], [1, 3]) == [100, 300]
    assert shares([100, 30], [1, 1]) == [30, 30]
    assert shares([], []) == []


@given(st.lists(st.tuples(st.integers(1, 500), st.floats(0.01, 10)), min_size=1, max_size=4))
def test_shares_never_exceed_the_rows_and_one_source_is_whole(sources: list[tuple[int, float]]) -> None:
    counts, weights = [count for count, _ in sources], [weight for _, weight in sources]
    drawn = shares(counts, weights)
    assert all(0 <= share <= count for share, count in zip(drawn, counts, strict=True))
    assert any(share == count for share, count in zip(drawn, counts, strict=True))


def test_a_row_stays_drawn_when_others_come() -> None:
    keys = np.random.default_rng(0).integers(0, 2**63, 40).astype(np.uint64)
    numbers = np.array([0] * 30 + [1] * 10)
    before = drawn_rows(numbers, keys, [1, 1])
    assert before.sum() == 20
    shuffled = np.random.default_rng(1).permutation(40)
    after = drawn_rows(numbers[shuffled], keys[shuffled], [1, 1])
    assert set(keys[before].tolist()) == set(keys[shuffled][after].tolist())


def test_every_stretch_holds_the_proportions() -> None:
    numbers = np.array([0] * 300 + [1] * 100)
    order = interleaved(numbers, np.ones(400, np.bool_))
    assert sorted(order.tolist()) == list(range(400))
    for start in range(0, 400, 40):
        assert 9 <= int((numbers[order[start : start + 40]] == 1).sum()) <= 11
