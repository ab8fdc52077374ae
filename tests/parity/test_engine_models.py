"""The engine against the plain Hugging Face forward, one branch at a time, for tiny random models of many families."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from tests.support.models import FAMILIES, tiny_model
from tests.support.trees import random_trees
from tunesmith.engine.engine import Engine
from tunesmith.engine.logprobs import Logprobs
from tunesmith.engine.plain import plain_logprobs

SHAPES = (  # prompt length, answer lengths: prompts of one token, answers of one token, 1 to 8 branches, no prompt
    (5, (7, 4)),
    (1, (3, 9)),
    (6, (1, 1)),
    (9, (4,)),
    (3, (2, 5, 1, 4, 3, 6, 2, 2)),
    (0, (8,)),
    (12, (11, 10)),
)


def _gradients(model: PreTrainedModel, logprobs: Logprobs) -> list[torch.Tensor]:
    weights_N = torch.linspace(-1, 2, len(logprobs.logprob_N))  # non-uniform upstream weights (TRAPS 9)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return list(torch.autograd.grad((logprobs.logprob_N * weights_N).sum(), parameters, allow_unused=True))


def _relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).detach().abs().max() / want.detach().abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_and_gradients_equal_the_plain_forward(family: str) -> None:
    model = tiny_model(family).eval()
    trees = random_trees(SHAPES, vocabulary=model.config.vocab_size)
    plain = plain_logprobs(model, trees)
    ours = Engine(model).logprobs(trees)
    assert _relative(ours.logprob_N, plain.logprob_N) < 1e-5
    assert ours.branch_N.tolist() == plain.branch_N.tolist()
    want = _gradients(model, plain)
    got = _gradients(model, ours)
    scale = max(float(gradient.abs().max()) for gradient in want if gradient is not None)
    for mine, reference in zip(got, want, strict=True):
        assert (mine is None) == (reference is None)
        if mine is not None and reference is not None:
            assert float((mine - reference).abs().max()) < 1e-5 * scale
