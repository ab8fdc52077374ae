"""The reference: scored once, cached by content, never stale, never zero (TRAPS 40, 41, 44 to 46)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.models import tiny_model
from tests.support.trees import random_trees
from tunesmith.engine.engine import Engine
from tunesmith.engine.plain import plain_logprobs
from tunesmith.engine.reference import cache_key, reference_logprobs, score
from tunesmith.errors import NumericsError
from tunesmith.model.fingerprint import weights_sha

TREES = random_trees(((4, (5, 3)), (2, (4, 6)), (7, (1, 2)), (0, (6,))), vocabulary=96)


def _scores(engine: Engine, folder: Path | None) -> tuple[list[np.ndarray], bool]:
    return reference_logprobs(
        engine, TREES, forest_tokens=24, fingerprint=weights_sha(engine.model), cache_folder=folder
    )


def test_scores_are_the_plain_forwards_tree_by_tree() -> None:
    model = tiny_model("llama")
    scores = score(Engine(model), TREES, forest_tokens=24)
    for tree, values in zip(TREES, scores, strict=True):
        with torch.no_grad():
            plain_N = plain_logprobs(model, [tree]).logprob_N
        np.testing.assert_allclose(values, plain_N.numpy(), rtol=1e-5, atol=1e-5)


def test_the_second_time_comes_from_the_cache_and_is_the_same(tmp_path: Path) -> None:
    engine = Engine(tiny_model("llama"))
    first, cached = _scores(engine, tmp_path)
    assert not cached
    second, cached = _scores(engine, tmp_path)
    assert cached
    assert all(np.array_equal(one, two) for one, two in zip(first, second, strict=True))


def test_weights_changed_in_memory_have_another_reference(tmp_path: Path) -> None:
    engine = Engine(tiny_model("llama"))
    first, _ = _scores(engine, tmp_path)
    with torch.no_grad():
        next(engine.model.parameters()).add_(0.05)
    second, cached = _scores(engine, tmp_path)
    assert not cached
    assert not np.allclose(first[0], second[0], atol=1e-4)


def test_a_damaged_cache_file_is_made_again(tmp_path: Path) -> None:
    engine = Engine(tiny_model("llama"))
    first, _ = _scores(engine, tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))
    second, cached = _scores(engine, tmp_path)
    assert not cached
    assert all(np.array_equal(one, two) for one, two in zip(first, second, strict=True))


def test_a_cache_of_other_numbers_is_found_out_by_the_recomputed_rows(tmp_path: Path) -> None:
    engine = Engine(tiny_model("llama"))
    _scores(engine, tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    other = Engine(tiny_model("llama", rope_theta=100.0))
    _, cached = reference_logprobs(
        other, TREES, forest_tokens=24, fingerprint=weights_sha(engine.model), cache_folder=tmp_path
    )
    assert path.is_file()
    assert not cached


def test_the_key_changes_with_everything_that_the_numbers_depend_on() -> None:
    model = tiny_model("llama")
    key = cache_key(Engine(model), TREES, fingerprint="a", forest_tokens=24)
    others = [
        cache_key(Engine(model), TREES, fingerprint="b", forest_tokens=24),
        cache_key(Engine(model, "plain"), TREES, fingerprint="a", forest_tokens=24),
        cache_key(Engine(model), TREES[:-1], fingerprint="a", forest_tokens=24),
        cache_key(Engine(tiny_model("llama").to(torch.bfloat16)), TREES, fingerprint="a", forest_tokens=24),
    ]
    assert len({key, *others}) == 5
    assert cache_key(Engine(model), TREES[::-1], fingerprint="a", forest_tokens=24) == key  # order is not content


def test_dropout_is_off_and_the_mode_restored() -> None:
    model = tiny_model("gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5).train()
    first = score(Engine(model), TREES, forest_tokens=24)
    second = score(Engine(model), TREES, forest_tokens=24)
    assert all(np.array_equal(one, two) for one, two in zip(first, second, strict=True))
    assert model.training


def test_a_number_that_is_not_finite_is_refused_with_its_row() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[int(TREES[1].branches[0].ids[0])] = float("nan")
    with pytest.raises(NumericsError, match="tree-1"):
        score(Engine(model), TREES, forest_tokens=24)
