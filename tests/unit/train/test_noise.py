"""NEFTune's noise: its size, that only the row and the step decide it, and that evaluations are free of it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from tests.support.models import tiny_model
from tests.support.training import (
    MACHINE,
    Trial,
    answer_trees,
    assert_gradients_equal,
    gradients_of,
    lora_engine,
    sft_stage,
    weights_of,
)
from tunesmith.engine.engine import Engine
from tunesmith.model.adapters import add_adapter, inner_model
from tunesmith.model.added_tokens import AddedTokens
from tunesmith.objectives import supervised
from tunesmith.recipe.later import settings_of
from tunesmith.recipe.models import Lora
from tunesmith.runs.records import read_records
from tunesmith.train.noise import Noise, noisy
from tunesmith.train.step import Batch, accumulate

TREES = answer_trees(6)
CPU = torch.device("cpu")


def test_the_noise_is_uniform_up_to_alpha_over_the_root_of_length_times_width() -> None:
    tree = TREES[1]  # 40 + 2 tokens
    noise_TH = Noise("key", 5.0).of(tree, 64, CPU)
    most = 5 / math.sqrt(42 * 64)
    assert noise_TH.shape == (42, 64)
    assert 0.99 * most < float(noise_TH.abs().max()) <= most
    assert float(noise_TH.mean()) == pytest.approx(0, abs=0.05 * most)
    assert float(noise_TH.std()) == pytest.approx(most / math.sqrt(3), rel=0.05)


def test_row_and_step_decide_the_noise_and_nothing_else() -> None:
    own = Noise("0/sft/7", 5.0).of(TREES[0], 8, CPU)
    torch.manual_seed(11)
    assert_close(Noise("0/sft/7", 5.0).of(TREES[0], 8, CPU), own, rtol=0, atol=0)
    assert not torch.equal(Noise("0/sft/8", 5.0).of(TREES[0], 8, CPU), own)
    assert not torch.equal(Noise("0/sft/7", 5.0).of(replace(TREES[0], id="other"), 8, CPU), own)


def gradients(engine: Engine, forest_tokens: int) -> dict[str, torch.Tensor]:
    engine.model.eval()
    batch, objective = Batch(TREES), supervised("sft", label_smoothing=0.1)
    accumulate(engine, batch, objective=objective, forest_tokens=forest_tokens, machine=MACHINE)
    return gradients_of(engine)


@pytest.mark.parametrize("backend", ["sdpa", "plain"])
def test_micro_batches_and_the_plain_forward_see_the_same_noise(backend: str) -> None:
    engine = lora_engine(moved=True)
    noised = noisy(engine, sft_stage(neftune_alpha=50.0), key="0/sft/1")
    whole = gradients(noised, 10_000)
    other = replace(noised, backend="plain" if backend == "plain" else "sdpa")
    assert_gradients_equal(gradients(other, 1), whole)
    plain = gradients(engine, 10_000)
    assert any(float((plain[name] - whole[name]).norm()) > 0.05 * float(whole[name].norm()) for name in whole)


def test_noise_is_put_on_the_rows_of_added_tokens_too() -> None:
    """peft's trained rows stand in for the embeddings' own; without noise they are read as ever."""
    model = tiny_model("llama")
    adapted = add_adapter(model, Lora(r=4), seed=0, added=AddedTokens(("a", "b"), (5, 6)))
    engine = Engine(inner_model(adapted))
    engine.model.eval()
    before_N = engine.logprobs(TREES).logprob_N
    assert_close(replace(engine, noise=lambda embedded_TH, trees: embedded_TH).logprobs(TREES).logprob_N, before_N)
    zeros = replace(engine, noise=lambda embedded_TH, trees: 0 * embedded_TH).logprobs(TREES).logprob_N
    plain = replace(Engine(tiny_model("llama")), noise=lambda embedded_TH, trees: 0 * embedded_TH)
    assert_close(zeros, plain.logprobs(TREES).logprob_N)
    assert not torch.equal(zeros, before_N)


def test_training_is_noisy_and_evaluation_is_not(tmp_path: Path) -> None:
    weights, firsts = [], []
    for alpha in (0.0, 20.0):
        stage = sft_stage(max_steps=2, neftune_alpha=alpha)
        _, engine = Trial(tmp_path / str(alpha), stage, dropout=0.0).run()
        weights.append(weights_of(engine))
        firsts.append(read_records(tmp_path / str(alpha) / "eval.jsonl")[0]["loss"])
    assert firsts[0] == firsts[1]
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_stages_of_earlier_releases_are_known_by_the_same_settings() -> None:
    known = settings_of(sft_stage())
    assert not {"label_smoothing", "neftune_alpha"} & known.keys()
    assert settings_of(sft_stage(neftune_alpha=5.0))["neftune_alpha"] == 5.0
