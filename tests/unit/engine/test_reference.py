"""The reference: scored once, cached by content, never stale, never zero (TRAPS 40, 41, 44 to 46)."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.support.models import tiny_model
from tests.support.training import lora_engine
from tests.support.trees import random_trees
from tunesmith.data.types import Tree
from tunesmith.engine import reference, retry
from tunesmith.engine.engine import Engine
from tunesmith.engine.logprobs import Logprobs
from tunesmith.engine.plain import plain_logprobs
from tunesmith.engine.reference import cache_key, reference_logprobs
from tunesmith.engine.scoring import score
from tunesmith.errors import NumericsError, ResourceError
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
    model, shas = tiny_model("llama"), [tree.sha() for tree in TREES]
    key = cache_key(Engine(model), shas, fingerprint="a")
    others = [
        cache_key(Engine(model), shas, fingerprint="b"),
        cache_key(Engine(model, "plain"), shas, fingerprint="a"),
        cache_key(Engine(model), shas[:-1], fingerprint="a"),
        cache_key(Engine(tiny_model("llama").to(torch.bfloat16)), shas, fingerprint="a"),
    ]
    assert len({key, *others}) == 5
    assert cache_key(Engine(model), shas[::-1], fingerprint="a") == key  # order is not content


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


def test_another_packing_uses_the_same_cache(tmp_path: Path) -> None:
    """A sweep in which memory sets another token budget must not pay again."""
    engine = Engine(tiny_model("llama"))
    _scores(engine, tmp_path)
    _, cached = reference_logprobs(
        engine, TREES, forest_tokens=9, fingerprint=weights_sha(engine.model), cache_folder=tmp_path
    )
    assert cached


@pytest.mark.parametrize("most", [30, 9])  # 30: fewer trees at a time; 9: the larger trees one answer at a time
def test_where_memory_runs_out_it_goes_on_in_smaller_forests(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    model = tiny_model("llama")
    wanted = score(Engine(model), TREES, forest_tokens=100)
    real = Engine.logprobs

    def full(self: Engine, trees: list[Tree]) -> Logprobs:
        if sum(tree.num_tokens for tree in trees) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, trees)

    monkeypatch.setattr(Engine, "logprobs", full)
    monkeypatch.setattr(retry, "free_memory", lambda: None)  # collecting takes seconds where many tests have run
    told: list[str] = []
    found = score(Engine(model), TREES, forest_tokens=100, tell=told.append)
    assert told
    for one, two in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(Engine, "logprobs", lambda self, trees: full(self, [*trees, *trees, *trees, *trees, *trees]))
    with pytest.raises(ResourceError, match="single answer"):
        score(Engine(model), TREES, forest_tokens=100)


@pytest.mark.parametrize("trained", [False, True])
def test_only_an_adapter_that_changes_nothing_is_left_out(monkeypatch: pytest.MonkeyPatch, trained: bool) -> None:
    engine = lora_engine(moved=trained)
    wanted = score(engine, TREES, forest_tokens=24)
    switched: list[int] = []
    real = reference.without_adapter

    def spy(model: nn.Module) -> AbstractContextManager[None]:
        switched.append(1)
        return real(model)

    monkeypatch.setattr(reference, "without_adapter", spy)
    found, _ = reference_logprobs(engine, TREES, forest_tokens=24, fingerprint="")
    assert len(switched) == (0 if trained else 1)
    assert all(np.array_equal(one, two) for one, two in zip(found, wanted, strict=True))
