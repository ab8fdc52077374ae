"""Sequences, the gather and its gradient, and the kernel that is called; the kernel itself is emulated."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.support import flash
from tests.support.flash import spans
from tunesmith.engine import sdpa, varlen
from tunesmith.engine.layout import ForestLayout

CPU = torch.device("cpu")
TORCHS = varlen.torch_kernel  # before it is emulated


FOREST = spans((3, (2, 1, 4)), (0, (3, 2)), (2, (1,)), (5, (6, 1)), (1, (1, 1, 1, 1)))


@pytest.fixture(autouse=True)
def _emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "torch_kernel", lambda: flash.varlen_attn)
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=flash.flash_attn_varlen_func))


def test_a_tree_of_two_branches_by_hand() -> None:
    made = varlen.sequences_of(ForestLayout(spans((2, (1, 3))), "varlen"), CPU)  # tokens: p p a b b b
    assert made.query_starts_S1.tolist() == [0, 3, 6]  # p p a | b b b
    assert made.key_starts_S1.tolist() == [0, 3, 8]  # p p a | p p b b b
    assert (made.longest_queries, made.longest_keys) == (3, 5)
    assert made.key_K is not None
    assert made.key_K.tolist() == [0, 1, 2, 0, 1, 3, 4, 5]
    assert made.home_T is not None
    assert made.home_T.tolist() == [0, 1, 2, 5, 6, 7]
    assert [(token_R.tolist(), copy_R.tolist()) for token_R, copy_R in made.copies] == [([0, 1], [3, 4])]


def test_single_branches_gather_nothing() -> None:
    made = varlen.sequences_of(ForestLayout(spans((2, (1,)), (0, (4,))), "varlen"), CPU)
    assert made.key_K is None
    assert made.key_starts_S1.tolist() == made.query_starts_S1.tolist() == [0, 3, 7]


def test_sequences_are_made_once_a_forest() -> None:
    layout = ForestLayout(FOREST, "varlen")
    assert varlen.sequences_of(layout, CPU) is varlen.sequences_of(layout, CPU)


def _inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(3)
    num_tokens = FOREST[-1].stop
    query, key, value = (torch.randn(1, heads, num_tokens, 8, dtype=dtype).requires_grad_() for heads in (4, 2, 2))
    return query, key, value, torch.randn(1, num_tokens, 4, 8, dtype=dtype)


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("softcap", [None, 0.7])
def test_values_and_gradients_are_sdpas(window: int | None, softcap: float | None) -> None:
    query, key, value, upstream = _inputs(torch.float32 if softcap else torch.float64)  # sdpa soft-caps in float32
    found = []
    for attend in (varlen.attend, sdpa.attend):
        out = attend(query, key, value, ForestLayout(FOREST), scale=0.4, window=window, softcap=softcap)
        found.append((out, *torch.autograd.grad((out * upstream).sum(), (query, key, value))))
    for mine, reference in zip(*found, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-6 if softcap else 1e-12)


def test_the_gathers_gradient_is_autograds_own() -> None:
    flat_TGD = torch.randn(FOREST[-1].stop, 2, 4, dtype=torch.float64, requires_grad=True)
    made = varlen.sequences_of(ForestLayout(FOREST), CPU)
    assert made.key_K is not None
    upstream_KGD = torch.randn(len(made.key_K), 2, 4, dtype=torch.float64)
    ours = torch.autograd.grad(varlen._Gathered.apply(flat_TGD, made), flat_TGD, upstream_KGD)[0]
    autograds = torch.autograd.grad(flat_TGD.index_select(0, made.key_K), flat_TGD, upstream_KGD)[0]
    torch.testing.assert_close(ours, autograds, rtol=1e-12, atol=1e-12)


def test_a_changed_tree_moves_no_other_by_a_bit() -> None:
    query, key, value, _ = _inputs(torch.float32)
    with torch.no_grad():
        before = varlen.attend(query, key, value, ForestLayout(FOREST), scale=0.4)
        tree = slice(FOREST[0].start, FOREST[0].stop)
        key[:, :, tree] += 1
        value[:, :, tree] *= 2
        after = varlen.attend(query, key, value, ForestLayout(FOREST), scale=0.4)
    assert torch.equal(before[:, tree.stop :], after[:, tree.stop :])
    assert not torch.allclose(before[:, tree], after[:, tree])


def test_under_autocast_the_kernel_gets_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []

    def kernel(query: Tensor, key: Tensor, value: Tensor, *_: object, scale: float, window_size: object) -> Tensor:
        seen.extend((query.dtype, key.dtype, value.dtype))
        return query

    monkeypatch.setattr(varlen, "torch_kernel", lambda: kernel)  # torch 2.11's: it has no `enable_gqa`
    query, key, value, _ = _inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        varlen.attend(query, key, value.bfloat16(), ForestLayout(FOREST), scale=0.4)
    varlen.attend(query, key, value.bfloat16(), ForestLayout(FOREST), scale=0.4)  # keys rotated in float32
    assert seen == [torch.bfloat16] * 6


def test_attention_dropout_is_left_to_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value, _ = _inputs(torch.float32)
    monkeypatch.setattr(varlen, "torch_kernel", lambda: pytest.fail("a kernel without dropout was called"))
    torch.manual_seed(0)
    got = varlen.attend(query, key, value, ForestLayout(FOREST), scale=0.4, dropout=0.5)
    torch.manual_seed(0)
    assert torch.equal(got, sdpa.attend(query, key, value, ForestLayout(FOREST), scale=0.4, dropout=0.5))


def test_torchs_kernel_takes_the_call_and_gives_gradients_of_the_right_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "torch_kernel", TORCHS)
    layout = ForestLayout(FOREST, "varlen")
    varlen.sequences_of(layout, CPU)
    num_tokens = FOREST[-1].stop
    with FakeTensorMode(allow_non_fake_inputs=True):  # shapes alone: the kernel needs a card
        query, key, value = (
            torch.randn(1, heads, num_tokens, 16, dtype=torch.bfloat16).requires_grad_() for heads in (4, 2, 2)
        )
        out = varlen.attend(query, key, value, layout, scale=0.4, window=3)
        grads = torch.autograd.grad(out.sum(), (query, key, value))
    assert out.shape == (1, num_tokens, 4, 16)
    assert [grad.shape for grad in grads] == [query.shape, key.shape, value.shape]
