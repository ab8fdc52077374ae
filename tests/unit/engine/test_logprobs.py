"""Chunked log-probs: values and gradients against a plain log-softmax, whatever the chunk, the head and its output."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tunesmith.engine import logprobs
from tunesmith.engine.head import Head
from tunesmith.engine.logprobs import Logprobs, token_logprobs

N, H, V = 11, 6, 17


def _case(bias: bool = False) -> tuple[nn.Linear, Tensor, Tensor]:
    torch.manual_seed(0)
    head = nn.Linear(H, V, bias=bias)
    return head, torch.randn(N, H, requires_grad=True), torch.randint(0, V, (N,))


def _judge(head: Head, hidden_NH: Tensor, target_N: Tensor) -> Tensor:
    """The definition, in float64, on all logits at once."""
    module = head.module
    assert isinstance(module, nn.Linear)
    logits_NV = hidden_NH.double() @ module.weight.double().T
    if module.bias is not None:
        logits_NV = logits_NV + module.bias.double()
    logits_NV = logits_NV * head.scale
    if head.softcap is not None:
        logits_NV = head.softcap * torch.tanh(logits_NV / head.softcap)
    logits_NV = logits_NV / head.temperature
    return logits_NV.log_softmax(-1).gather(-1, target_N[:, None]).squeeze(-1)


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, None), (1.0, 1.5), (3.0, 2.0)])
@pytest.mark.parametrize("rows", [1, 4, 100])
@pytest.mark.parametrize(("columns", "temperature"), [(3, 0.7), (V - 1, 1.0), (V, 2.0)])
def test_values_and_gradients_equal_a_plain_log_softmax(
    monkeypatch: pytest.MonkeyPatch,
    trainable: bool,
    scale: float,
    softcap: float | None,
    rows: int,
    columns: int,
    temperature: float,
) -> None:
    module, hidden_NH, target_N = _case(bias=True)
    module.requires_grad_(trainable)
    monkeypatch.setitem(logprobs.TILE_COLUMNS, "cpu", columns)
    head = Head(module, scale, softcap, temperature=temperature)
    weights_N = torch.linspace(-1, 2, N)
    wanted = [hidden_NH, *head.trainable()]

    want_N = _judge(head, hidden_NH, target_N)
    want_grads = torch.autograd.grad((want_N * weights_N).sum(), wanted)
    got_N = token_logprobs(hidden_NH, target_N, head, chunk_bytes=rows * columns * 4)
    got_grads = torch.autograd.grad((got_N * weights_N).sum(), wanted)

    assert got_N.dtype == torch.float32
    torch.testing.assert_close(got_N, want_N.float(), rtol=1e-5, atol=1e-6)
    for got, want in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=1e-6)


def test_a_second_backward_gives_the_same_gradient() -> None:
    module, hidden_NH, target_N = _case()
    module.requires_grad_(False)
    total = token_logprobs(hidden_NH, target_N, Head(module)).sum()
    (first,) = torch.autograd.grad(total, hidden_NH, retain_graph=True)
    (second,) = torch.autograd.grad(total, hidden_NH)
    assert torch.equal(first, second)


def test_an_adapted_head_trains_its_adapter() -> None:
    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(H, V, bias=False).requires_grad_(False)
            self.low = nn.Linear(H, 2, bias=False)
            self.high = nn.Linear(2, V, bias=False)

        @property
        def weight(self) -> Tensor:
            return self.base.weight

        def forward(self, hidden_CH: Tensor) -> Tensor:
            return self.base(hidden_CH) + self.high(self.low(hidden_CH))

    torch.manual_seed(1)
    module = Adapted()
    hidden_NH, target_N = torch.randn(N, H, requires_grad=True), torch.randint(0, V, (N,))
    wanted = [hidden_NH, module.low.weight, module.high.weight]
    want_N = module(hidden_NH).log_softmax(-1).gather(-1, target_N[:, None]).squeeze(-1)
    want = torch.autograd.grad(want_N.sum(), wanted)
    got = torch.autograd.grad(token_logprobs(hidden_NH, target_N, Head(module), chunk_bytes=3 * V * 4).sum(), wanted)
    for mine, reference in zip(got, want, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("trained", [False, True])
def test_no_more_than_a_tile_of_logits_is_ever_made(monkeypatch: pytest.MonkeyPatch, trained: bool) -> None:
    module, hidden_NH, target_N = _case()
    module.requires_grad_(trained)
    monkeypatch.setitem(logprobs.TILE_COLUMNS, "cpu", 10)
    seen: list[tuple[int, int]] = []
    real = logprobs._tile

    def spy(head: Head, hidden_CH: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
        seen.append((len(hidden_CH), stop - start))
        return real(head, hidden_CH, start, stop)

    monkeypatch.setattr(logprobs, "_tile", spy)
    token_logprobs(hidden_NH, target_N, Head(module), chunk_bytes=4 * 10 * 4).sum().backward()
    once = [(rows, columns) for rows in (4, 4, 3) for columns in (10, 7)]
    assert seen == once * (2 if trained else 1)  # a frozen head makes none again in the backward


@pytest.mark.parametrize("trained", [False, True])
def test_real_sizes_stay_within_1e_5_of_float64(trained: bool) -> None:
    """Logits from -60 to 60, as of a confident model, over several tiles of columns."""
    torch.manual_seed(3)
    module = nn.Linear(64, 5000, bias=False).requires_grad_(trained)
    with torch.no_grad():
        module.weight.mul_(20)
    hidden_NH, target_N = (2 * torch.randn(96, 64)).requires_grad_(), torch.randint(0, 5000, (96,))
    wanted = [hidden_NH, *([module.weight] if trained else [])]
    exact_N = _judge(Head(module), hidden_NH, target_N)
    exact_grads = torch.autograd.grad(exact_N.sum(), wanted)
    got_N = token_logprobs(hidden_NH, target_N, Head(module))
    grads = torch.autograd.grad(got_N.sum(), wanted)
    assert float(((got_N - exact_N).abs().max() / exact_N.abs().max()).detach()) < 1e-5
    for grad, exact in zip(grads, exact_grads, strict=True):
        assert float((grad - exact).abs().max() / exact.abs().max()) < 1e-5


@pytest.mark.parametrize("trained", [False, True])
def test_autocast_computes_in_its_type_and_leaves_gradients_of_the_weights_in_float32(trained: bool) -> None:
    module, hidden_NH, target_N = _case(bias=True)
    module.requires_grad_(trained)
    wanted = [hidden_NH, *Head(module).trainable()]
    exact = torch.autograd.grad(_judge(Head(module), hidden_NH, target_N).sum(), wanted)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got_N = token_logprobs(hidden_NH, target_N, Head(module))
    grads = torch.autograd.grad(got_N.sum(), wanted)  # outside of it, as a backward is
    assert got_N.dtype == torch.float32
    for grad, want in zip(grads, exact, strict=True):
        assert grad.dtype == torch.float32
        torch.testing.assert_close(grad, want.float(), rtol=0.1, atol=0.1)
    assert not torch.equal(got_N, token_logprobs(hidden_NH, target_N, Head(module)))


def test_bfloat16_logits_are_reduced_in_float32() -> None:
    torch.manual_seed(2)
    module = nn.Linear(H, 4096, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    hidden_NH, target_N = torch.randn(512, H, dtype=torch.bfloat16), torch.randint(0, 4096, (512,))
    exact_N = module(hidden_NH).double().log_softmax(-1).gather(-1, target_N[:, None]).squeeze(-1)
    got_N = token_logprobs(hidden_NH, target_N, Head(module))
    rough_N = module(hidden_NH).log_softmax(-1).gather(-1, target_N[:, None]).squeeze(-1)
    assert abs(float(got_N.double().sum() - exact_N.sum())) < 1e-2  # nats a sequence of 512 tokens (TRAPS 51)
    assert abs(float(rough_N.double().sum() - exact_N.sum())) > 1e-2  # what bfloat16 would have cost


def test_logits_are_aligned_with_the_token_that_they_predict() -> None:
    """A head that is certain of token t + 1 has loss 0; one that is certain of token t has a large one (TRAPS 25)."""
    ids_L = torch.tensor([3, 1, 4, 2])
    head = nn.Linear(5, 5, bias=False)
    with torch.no_grad():
        head.weight.copy_(100 * torch.eye(5))
    next_token = nn.functional.one_hot(ids_L[1:], 5).float()
    same_token = nn.functional.one_hot(ids_L[:-1], 5).float()
    head.requires_grad_(False)
    assert float(token_logprobs(next_token, ids_L[1:], Head(head)).abs().max()) < 1e-6
    assert float(token_logprobs(same_token, ids_L[1:], Head(head)).max()) < -50


def test_nothing_trained_gives_nothing() -> None:
    module, hidden_NH, target_N = _case()
    got_N = token_logprobs(hidden_NH[:0], target_N[:0], Head(module))
    assert got_N.shape == (0,)
    got_N.sum().backward()


def test_sums_per_branch() -> None:
    some = Logprobs(torch.tensor([-1.0, -2.0, -4.0]), torch.tensor([0, 0, 2]), torch.tensor([0, 0, 1]))
    assert some.per_branch().tolist() == [-3.0, 0.0, -4.0]
