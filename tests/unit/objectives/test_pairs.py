"""What a recipe may change about any paired method, by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, tensor

from tunesmith.engine.logprobs import Logprobs
from tunesmith.objectives.pairs import PairOptions, Pairs, paired, pairs_of
from tunesmith.objectives.wpo import wpo_weights


def one_pair(**changes: Tensor) -> Logprobs:
    """A chosen answer of three tokens and a rejected one of one."""
    seen = Logprobs(
        tensor([-1.0, -2.0, -4.0, -3.0]),
        branch_N=tensor([0, 0, 0, 1]),
        tree_B=tensor([0, 0]),
        reference_N=tensor([-1.5, -2.5, -5.0, -2.0]),
    )
    return replace(seen, **changes) if changes else seen


def two_pairs(weight_G: Tensor | None) -> Logprobs:
    """Answers of one token."""
    zeros_N = torch.zeros(4)
    return Logprobs(
        tensor([-1.0, -2.0, -3.0, -5.0]), tensor([0, 1, 2, 3]), tensor([0, 0, 1, 1]), zeros_N, weight_G=weight_G
    )


def chosen_logratio(pairs: Pairs) -> Tensor:
    """A made-up loss that shows what it is given."""
    return pairs.logratio_PK[:, 0]


def test_tokens_beyond_the_shorter_answer_count_alpha_in_policy_and_reference() -> None:
    pairs = pairs_of(one_pair(), alpha=0.5)
    assert pairs.policy_PK.tolist() == [[-1.0 + 0.5 * -6.0, -3.0]]
    assert pairs.reference_PK is not None
    assert pairs.reference_PK.tolist() == [[-1.5 + 0.5 * -7.5, -2.0]]
    assert pairs.tokens_PK.tolist() == [[3.0, 1.0]]


def test_the_added_nll_is_of_the_whole_answer() -> None:
    """7 nats over 3 tokens, also where the answer's end counts nothing in the loss itself: -1 + 1.5 + 0.6 * 7/3."""
    options = PairOptions(sft_weight=0.6, length_desensitization=0.0)
    result = paired("m", chosen_logratio, beta=1.0, options=options).function(one_pair())
    assert result.loss.mean() == pytest.approx(0.5 + 0.6 * 7 / 3)
    assert result.metrics["logprob_chosen"].mean() == -7.0  # as it is, not as it counts
    assert result.metrics["reward_chosen"].mean() == pytest.approx(0.5)  # as the loss sees it


def test_wpo_weighs_by_how_likely_the_answers_are_for_the_policy() -> None:
    """Means over tokens of log p - collision: chosen (-1 - 2 - 4 + 3 * 2) / 3 = -1/3, rejected -3 + 2 = -1."""
    seen = one_pair(extras={"collision": torch.full((4,), -2.0)})  # type: ignore[arg-type]
    assert float(wpo_weights(seen)) == pytest.approx(math.exp(-4 / 3))
    sure = one_pair(extras={"collision": torch.full((4,), -9.0)})  # type: ignore[arg-type]
    assert float(wpo_weights(sure)) == 1.0
    objective = paired("m", chosen_logratio, beta=1.0, options=PairOptions(wpo=True))
    assert objective.wants == ("collision",)
    assert objective.function(seen).loss.mean() == pytest.approx(2.0 * math.exp(-4 / 3))


def test_a_pairs_weight_is_its_share_of_the_step() -> None:
    """(3 * -1 + 1 * -3) / 4; without the option the weights are not read."""
    weighted = paired("m", chosen_logratio, beta=1.0, options=PairOptions(pair_weights=True))
    result = weighted.function(two_pairs(tensor([3.0, 1.0])))
    assert (result.loss.mean(), result.loss.count) == (-1.5, 4.0)
    plain = paired("m", chosen_logratio, beta=1.0)
    assert plain.function(two_pairs(tensor([3.0, 1.0]))).loss.mean() == -2.0
    assert weighted.function(two_pairs(None)).loss.mean() == -2.0  # all alike
