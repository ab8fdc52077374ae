"""The CPU's attention over a forest is the span loop's, values and gradients, and reads no hidden key."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tunesmith.engine import cpu_flash, sdpa
from tunesmith.engine.forest import TreeSpan
from tunesmith.engine.layout import ForestLayout

A, G, D = 4, 2, 8
SPANS = (
    TreeSpan(0, 150, (40, 170, 1)),
    TreeSpan(361, 0, (129,)),
    TreeSpan(490, 1, (1, 2)),
    TreeSpan(494, 70, (200,)),
)
T = 764


def inputs(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    parts = [torch.randn(1, T, heads, D, dtype=dtype).transpose(1, 2) for heads in (A, G, G)]
    return [part.requires_grad_() for part in parts]


def run(attend: Callable[..., Tensor], window: int | None, dtype: torch.dtype) -> list[Tensor]:
    parts = inputs(dtype)
    out = attend(*parts, ForestLayout(SPANS), scale=0.3, window=window)
    torch.manual_seed(1)
    return [out.detach(), *torch.autograd.grad(out, parts, torch.randn(out.shape, dtype=dtype))]


@pytest.mark.parametrize("window", [None, 1, 33, 100, 5000])
def test_values_and_gradients_are_those_of_the_loop_over_spans(
    monkeypatch: pytest.MonkeyPatch, window: int | None
) -> None:
    found = run(cpu_flash.attend, window, torch.float32)
    monkeypatch.setattr(cpu_flash, "works", lambda dtype: False)
    wanted = run(sdpa.attend, window, torch.float32)
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("window", [None, 33])
def test_long_pieces_go_in_few_strips(monkeypatch: pytest.MonkeyPatch, window: int | None) -> None:
    monkeypatch.setattr(cpu_flash, "STRIP", 4)
    monkeypatch.setattr(cpu_flash, "LONG", 100)
    longest = ForestLayout(SPANS).pieces[0]
    assert len(list(cpu_flash.strips(longest, window))) == (1 if window is None else 16)
    found = run(cpu_flash.attend, window, torch.float32)
    monkeypatch.setattr(cpu_flash, "works", lambda dtype: False)
    wanted = run(sdpa.attend, window, torch.float32)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-6)


def test_bfloat16_agrees_to_its_rounding() -> None:
    found, wanted = run(cpu_flash.attend, None, torch.bfloat16), run(cpu_flash.attend, None, torch.float32)
    for one, other in zip(found, wanted, strict=True):
        assert float((one.float() - other).abs().max()) < 0.05 * float(other.abs().max())


@pytest.mark.parametrize("window", [None, 33])
def test_strips_cover_every_query_once_and_only_keys_that_one_of_them_sees(window: int | None) -> None:
    for piece in ForestLayout(SPANS).pieces:
        found = list(cpu_flash.strips(piece, window))
        assert [strip.start for strip in found[1:]] == [strip.stop for strip in found[:-1]]
        assert found[0].start == 0 and found[-1].stop == piece.num_queries
        for strip in found:
            assert strip.last == piece.num_keys - piece.num_queries + strip.stop
            first_query = strip.last - (strip.stop - strip.start)
            assert strip.first == (0 if window is None else max(0, first_query - window + 1))


def test_nothing_is_copied_but_prompts_of_further_branches() -> None:
    """What is saved for the backward: queries, keys, values, the result, and one number a query and head."""
    query, key, value = inputs()
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        cpu_flash.attend(query, key, value, ForestLayout(SPANS), scale=0.3, window=None)
    assert sum(saved.values()) == 4 * T * (2 * A * D + 2 * G * D + A)


def test_where_the_kernel_is_missing_the_loop_stands_in(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: object, **__: object) -> None:
        raise AttributeError("no such operator")

    monkeypatch.setattr(cpu_flash, "_kernel", absent)
    cpu_flash.works.cache_clear()
    try:
        assert not cpu_flash.works(torch.float32)
        query, key, value = inputs()
        assert sdpa.attend(query, key, value, ForestLayout(SPANS), scale=0.3).shape == (1, T, A, D)
    finally:
        cpu_flash.works.cache_clear()


def test_a_kernel_that_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    real = cpu_flash._kernel

    def top_left(query: Tensor, key: Tensor, value: Tensor, mask_QK: Tensor | None, *, scale: float) -> object:
        return real(query, key, value, None, scale=scale)

    monkeypatch.setattr(cpu_flash, "_kernel", top_left)
    cpu_flash.works.cache_clear()
    try:
        assert not cpu_flash.works(torch.float32)
    finally:
        cpu_flash.works.cache_clear()
