"""Negative log-likelihood by hand, and what counts as a unit."""

from __future__ import annotations

import numpy as np
import pytest
from torch import tensor

from tunesmith.data.types import Branch, Tree
from tunesmith.engine.logprobs import Logprobs
from tunesmith.objectives import objective_of, supervised
from tunesmith.objectives.supervised import trained_tokens
from tunesmith.recipe.models import CompletionStage, DpoStage, SftStage, Source


def test_sum_and_count_over_tokens() -> None:
    result = supervised("sft").function(Logprobs(tensor([-1.0, -0.5, -2.5]), tensor([0, 0, 1]), tensor([0, 1])))
    assert (float(result.loss.total), result.loss.count) == (4.0, 3)
    assert result.loss.mean() == pytest.approx(4 / 3)


def test_a_texts_first_token_is_no_unit() -> None:
    branch = Branch(np.array([5, 6, 7], np.int32), np.array([True, True, False]))
    assert trained_tokens(Tree("text", np.zeros(0, np.int32), (branch,))) == 1
    assert trained_tokens(Tree("prompted", np.array([4], np.int32), (branch,))) == 2


def test_the_recipe_names_the_objective() -> None:
    source = [Source(path="x.jsonl")]
    assert objective_of(SftStage(name="a", train=source)).name == "sft"
    assert objective_of(CompletionStage(name="a", train=source)).name == "completion"
    chosen = objective_of(DpoStage(name="a", train=source, beta=0.3))
    assert (chosen.name, chosen.num_answers, chosen.needs_reference) == ("dpo", 2, True)
