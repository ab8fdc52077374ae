"""Negative log-likelihood by hand, its smoothing and weights, and what counts as a unit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from torch import tensor

from tests.support.training import answer_trees
from tunesmith.data.types import Branch, Tree
from tunesmith.engine.logprobs import Logprobs
from tunesmith.objectives import objective_of, supervised
from tunesmith.objectives.supervised import trained_tokens
from tunesmith.recipe.models import CompletionStage, DpoStage, SftStage, Source

THREE = Logprobs(
    tensor([-1.0, -0.5, -2.5]), tensor([0, 0, 1]), tensor([0, 1]), extras={"mean": tensor([-4.0, -5.0, -6.0])}
)


def test_sum_and_count_over_tokens() -> None:
    result = supervised("sft").function(THREE)
    assert (float(result.loss.total), result.loss.count) == (4.0, 3)
    assert result.loss.mean() == pytest.approx(4 / 3)
    assert not result.metrics


def test_label_smoothing_takes_a_share_of_the_mean_over_the_vocabulary() -> None:
    result = supervised("sft", label_smoothing=0.1).function(THREE)
    assert float(result.loss.total) == pytest.approx(0.9 * 4 + 0.1 * 15)  # 5.1
    assert result.metrics["nll"].mean() == pytest.approx(4 / 3)


def test_a_token_of_half_the_weight_counts_half() -> None:
    given = replace(THREE, weight_N=tensor([1.0, 0.5, 0.25]))
    result = supervised("sft", label_smoothing=0.1).function(given)
    assert result.loss.count == 1.75
    # losses 0.9 * 1 + 0.1 * 4 = 1.3, 0.45 + 0.5 = 0.95, 2.25 + 0.6 = 2.85
    assert float(result.loss.total) == pytest.approx(1.3 + 0.475 + 0.7125)
    assert result.metrics["nll"].mean() == pytest.approx((1 + 0.25 + 0.625) / 1.75)


def test_a_texts_first_token_is_no_unit() -> None:
    branch = Branch(np.array([5, 6, 7], np.int32), np.array([True, True, False]))
    assert trained_tokens(Tree("text", np.zeros(0, np.int32), (branch,))) == 1
    assert trained_tokens(Tree("prompted", np.array([4], np.int32), (branch,))) == 2


def test_a_weighted_token_is_its_weight_of_a_unit() -> None:
    weights = np.array([0.5, 0.25, 0], np.float32)
    branch = Branch(np.array([5, 6, 7], np.int32), np.array([True, True, False]), weights)
    assert trained_tokens(Tree("text", np.zeros(0, np.int32), (branch,))) == 0.25
    assert trained_tokens(Tree("prompted", np.array([4], np.int32), (branch,))) == 0.75
    assert trained_tokens(answer_trees(1)[0]) == 9


def test_the_recipe_names_the_objective() -> None:
    source = [Source(path="x.jsonl")]
    assert objective_of(SftStage(name="a", train=source)).name == "sft"
    assert objective_of(SftStage(name="a", train=source)).wants == ()
    assert objective_of(SftStage(name="a", train=source, label_smoothing=0.1)).wants == ("mean",)
    assert objective_of(CompletionStage(name="a", train=source)).name == "completion"
    assert objective_of(CompletionStage(name="a", train=source, label_smoothing=0.1)).wants == ("mean",)
    chosen = objective_of(DpoStage(name="a", train=source, beta=0.3))
    assert (chosen.name, chosen.num_answers, chosen.needs_reference) == ("dpo", 2, True)
