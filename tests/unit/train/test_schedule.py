from __future__ import annotations

import math

import pytest

from tunesmith.train.schedule import Kind, lr_multiplier, num_warmup_steps


def rates(num_steps: int, warmup_fraction: float, kind: Kind) -> list[float]:
    return [
        lr_multiplier(step, num_steps, warmup_fraction=warmup_fraction, kind=kind) for step in range(1, num_steps + 1)
    ]


def test_linear_by_hand() -> None:
    # two warm-up steps, then 1 - 0/4, 1 - 1/4, 1 - 2/4, 1 - 3/4
    assert rates(6, 1 / 3, "linear") == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]


def test_cosine_by_hand() -> None:
    half = math.sqrt(0.5)
    assert rates(4, 0.0, "cosine") == pytest.approx([1.0, (1 + half) / 2, 0.5, (1 - half) / 2])


def test_constant_by_hand() -> None:
    assert rates(4, 0.5, "constant") == [0.5, 1.0, 1.0, 1.0]


def test_warmup_of_all_steps_has_no_decay() -> None:
    assert rates(4, 1.0, "cosine") == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize(("num_steps", "fraction", "expected"), [(30, 0.1, 3), (20, 0.03, 1), (7, 0.0, 0), (1, 1.0, 1)])
def test_warmup_rounds_up(num_steps: int, fraction: float, expected: int) -> None:
    assert num_warmup_steps(num_steps, fraction) == expected


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_one_step_has_the_whole_rate(kind: Kind) -> None:
    assert rates(1, 0.03, kind) == [1.0]
