"""Alternatives for log-probs under a frozen head, on equal inputs: time, memory, precision.

In: a card (or `--toy`). Out: one line of JSON, with a row for every alternative and size, and the fastest that passes.
Must not know: models, training.

Each does what the engine asks of it: N hidden states in bfloat16, the head's weight [V, H], targets; out come N
float32 log-probs, and with a gradient [N] given, the gradient of the hidden states. Precision, on fewer tokens:
float32 inputs within 1e-5 (relative) of float64, bfloat16 inputs within 1e-2 nats a 512-token sequence of the float32
softmax over the same logits. Cross-entropy losses that give no vector of log-probs cannot serve DPO and are left out.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from tunesmith.engine.logprobs import Head, token_logprobs

Alternative = Callable[[Tensor, Tensor, Tensor], Tensor]
SIZES = ((2048, 4096, 128_256), (8192, 4096, 128_256), (4096, 5120, 152_064), (4096, 2560, 51_200))
"""(N, H, V): Llama 3.1 8B with few and with many trained tokens, Qwen2.5 14B, Phi-2."""
LIMIT_FLOAT32, LIMIT_SEQUENCE_NATS = 1e-5, 1e-2
LIMIT_GRADIENT = 2e-2
"""Relative, of the low-precision gradient: a kernel that scales all tokens by one number is far above it."""
MIB = 2**20


@dataclass(frozen=True)
class Result:
    """One alternative at one size."""

    name: str
    size: tuple[int, int, int]
    milliseconds: float | None = None
    peak_mib: float | None = None
    error_float32: float | None = None
    error_gradient: float | None = None
    error_sequence_nats: float | None = None
    error_gradient_low: float | None = None
    problem: str = ""

    @property
    def passes(self) -> bool:
        """Precise enough to serve. A kernel that takes no float32 is judged by its bfloat16 alone."""
        float32 = self.error_float32 is None or self.error_float32 <= LIMIT_FLOAT32
        nats, gradient = self.error_sequence_nats, self.error_gradient_low
        if self.problem or not float32 or nats is None or gradient is None:
            return False
        return nats <= LIMIT_SEQUENCE_NATS and gradient <= LIMIT_GRADIENT


def _engine(chunk_mib: int | None) -> Alternative:
    """The product's own, at a size of chunks."""

    def run(hidden_NH: Tensor, target_N: Tensor, weight_VH: Tensor) -> Tensor:
        module = nn.Linear(1, 1, bias=False, device="meta")
        module.weight = nn.Parameter(weight_VH, requires_grad=False)
        chunk_bytes = None if chunk_mib is None else chunk_mib * MIB
        return token_logprobs(hidden_NH, target_N, Head(module), chunk_bytes=chunk_bytes)

    return run


def _simple_chunk(hidden_CH: Tensor, target_C: Tensor, weight_VH: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs of a chunk and their directions; torch.compile fuses what lies between the products."""
    logits_CV = linear(hidden_CH, weight_VH).float()
    chosen_C = logits_CV.gather(-1, target_C[:, None]).squeeze(-1)
    top_C1 = logits_CV.amax(-1, keepdim=True)
    odds_CV = (logits_CV - top_C1).exp()
    total_C1 = odds_CV.sum(-1, keepdim=True)
    expected_CH = (odds_CV.to(hidden_CH.dtype) @ weight_VH) / total_C1
    direction_CH = (weight_VH[target_C] - expected_CH).to(hidden_CH.dtype)
    return chosen_C - (top_C1 + total_C1.log()).squeeze(-1), direction_CH


class _Chunked(torch.autograd.Function):
    """A function of chunks, run over all of them; the directions are kept for the backward pass."""

    @staticmethod
    def forward(ctx, hidden_NH: Tensor, target_N: Tensor, weight_VH: Tensor, function: Any, chunk: int) -> Tensor:  # noqa: ANN001, ANN401
        parts = zip(hidden_NH.split(chunk), target_N.split(chunk), strict=True)
        done = [function(hidden_CH, target_C, weight_VH) for hidden_CH, target_C in parts]
        ctx.save_for_backward(torch.cat([direction for _, direction in done]))
        return torch.cat([logprob for logprob, _ in done])

    @staticmethod
    def backward(ctx, grad_N: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN001
        (direction_NH,) = ctx.saved_tensors
        return direction_NH * grad_N[:, None].to(direction_NH.dtype), None, None, None, None


def _compiled(chunk_mib: int) -> Alternative:
    function = torch.compile(_simple_chunk, dynamic=False)

    def run(hidden_NH: Tensor, target_N: Tensor, weight_VH: Tensor) -> Tensor:
        chunk = max(1, chunk_mib * MIB // (4 * len(weight_VH)))
        logprob_N: Tensor = _Chunked.apply(hidden_NH, target_N, weight_VH, function, chunk)
        return logprob_N

    return run


def _triton(name: str, chunk_mib: int = 0) -> Alternative:
    from benchmarks.gpu import head_kernels

    def run(hidden_NH: Tensor, target_N: Tensor, weight_VH: Tensor) -> Tensor:
        if name == "tiled":
            return head_kernels.tiled(hidden_NH, target_N, weight_VH)
        chunk = max(1, chunk_mib * MIB // (hidden_NH.element_size() * len(weight_VH)))
        return head_kernels.rows(hidden_NH, target_N, weight_VH, chunk=chunk)

    return run


def _liger() -> Alternative:
    """Liger's fused linear cross-entropy, one loss a token. Its gradient is that of the given weights' sum."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    def run(hidden_NH: Tensor, target_N: Tensor, weight_VH: Tensor) -> Tensor:
        loss_N: Tensor = liger_fused_linear_cross_entropy(hidden_NH, weight_VH, target_N, reduction="none")
        return -loss_N.float()

    return run


def _cut_cross_entropy() -> Alternative:
    from cut_cross_entropy import linear_cross_entropy

    def run(hidden_NH: Tensor, target_N: Tensor, weight_VH: Tensor) -> Tensor:
        loss_N: Tensor = linear_cross_entropy(hidden_NH, weight_VH, target_N, reduction="none")
        return -loss_N.float()

    return run


def alternatives(*, on_card: bool, interpreted: bool = False) -> dict[str, Callable[[], Alternative]]:
    """Makers by name; those that need a package that is absent are left out."""
    sizes = (None, 64, 256, 1024) if on_card else (None, 1)
    made: dict[str, Callable[[], Alternative]] = {}
    for mib in sizes:
        made[f"engine, {'default chunk' if mib is None else f'chunks of {mib} MiB'}"] = lambda mib=mib: _engine(mib)
    if on_card:
        made |= {f"torch.compile, chunks of {mib} MiB": lambda mib=mib: _compiled(mib) for mib in (256, 1024)}
    if find_spec("triton") is not None and (on_card or interpreted):
        chunks = (64, 256) if on_card else (1,)
        made |= {f"Triton rows, chunks of {mib} MiB": lambda mib=mib: _triton("rows", mib) for mib in chunks}
        made["Triton tiled"] = lambda: _triton("tiled")
    if on_card and find_spec("liger_kernel") is not None:
        made["Liger fused linear cross-entropy"] = _liger
    if on_card and find_spec("cut_cross_entropy") is not None:
        made["cut-cross-entropy"] = _cut_cross_entropy
    return made


def _inputs(num_n: int, num_h: int, num_v: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Logits of standard deviation about 2, as a model's; gradients of both signs."""
    generator = torch.Generator(device).manual_seed(num_n + num_h + num_v)
    hidden_NH = torch.randn(num_n, num_h, device=device, generator=generator)
    weight_VH = torch.randn(num_v, num_h, device=device, generator=generator, dtype=dtype).mul_(2 / num_h**0.5)
    target_N = torch.randint(num_v, (num_n,), device=device, generator=generator)
    grad_N = torch.randn(num_n, device=device, generator=generator)
    return hidden_NH.to(dtype), target_N, weight_VH, grad_N


def _both_ways(
    run: Alternative, hidden_NH: Tensor, target_N: Tensor, weight_VH: Tensor, grad_N: Tensor
) -> list[Tensor]:
    leaf_NH = hidden_NH.detach().requires_grad_()
    logprob_N = run(leaf_NH, target_N, weight_VH)
    (grad_NH,) = torch.autograd.grad(logprob_N, leaf_NH, grad_N)
    return [logprob_N.detach(), grad_NH]


def precision(run: Alternative, num_h: int, num_v: int, device: torch.device) -> dict[str, float]:
    """Errors in float32 against float64, and in low precision against the float32 softmax of the same logits."""
    found: dict[str, float] = {}
    num_n = 512
    hidden_NH, target_N, weight_VH, grad_N = _inputs(64, num_h, min(num_v, 32_000), torch.float32, device)
    wide_NH = hidden_NH.double().requires_grad_()
    exact_N = linear(wide_NH, weight_VH.double()).log_softmax(-1).gather(-1, target_N[:, None]).squeeze(-1)
    exact_N.backward(grad_N.double())
    exact_N = exact_N.detach()
    assert wide_NH.grad is not None
    try:
        logprob_N, grad_NH = _both_ways(run, hidden_NH, target_N, weight_VH, grad_N)
        found["error_float32"] = float(((logprob_N - exact_N).abs() / exact_N.abs().amax()).max())
        found["error_gradient"] = float((grad_NH - wide_NH.grad).norm() / wide_NH.grad.norm())
    except (RuntimeError, ValueError, TypeError, AssertionError, NotImplementedError) as problem:
        if isinstance(problem, torch.OutOfMemoryError):
            raise  # others: a kernel that takes no float32
    low = torch.bfloat16 if device.type == "cuda" else torch.float16
    hidden_NH, target_N, weight_VH, grad_N = _inputs(num_n, num_h, num_v, low, device)
    logits_NV = linear(hidden_NH, weight_VH).float()  # the logits as the model's own head gives them
    judged_N = logits_NV.log_softmax(-1).gather(-1, target_N[:, None]).squeeze(-1)
    sharp_NH = hidden_NH.float().requires_grad_()
    sharp_N = linear(sharp_NH, weight_VH.float()).log_softmax(-1).gather(-1, target_N[:, None]).squeeze(-1)
    sharp_N.backward(grad_N)
    sharp_N = sharp_N.detach()
    assert sharp_NH.grad is not None
    logprob_N, grad_NH = _both_ways(run, hidden_NH, target_N, weight_VH, grad_N)
    found["error_gradient_low"] = float((grad_NH.float() - sharp_NH.grad).norm() / sharp_NH.grad.norm())
    # A kernel that never rounds its logits is nearer to the products in float32; either is the truth it may be held to.
    total = logprob_N.sum()
    found["error_sequence_nats"] = float(torch.minimum((total - judged_N.sum()).abs(), (total - sharp_N.sum()).abs()))
    return found


def speed(run: Alternative, size: tuple[int, int, int], device: torch.device, *, repeats: int) -> dict[str, float]:
    """Median time of forward + backward, and the peak beside the inputs."""
    low = torch.bfloat16 if device.type == "cuda" else torch.float32
    inputs = _inputs(*size, low, device)
    on_card = device.type == "cuda"

    def wait() -> float:
        if on_card:
            torch.cuda.synchronize()
        return time.perf_counter()

    for _ in range(2):
        _both_ways(run, *inputs)
    seconds = []
    if on_card:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    for _ in range(repeats):
        start = wait()
        _both_ways(run, *inputs)
        seconds.append(wait() - start)
    peak = (torch.cuda.max_memory_allocated() - before) / MIB if on_card else 0.0
    return {"milliseconds": 1000 * median(seconds), "peak_mib": peak}


def measure(*, minutes: float, toy: bool, interpreted: bool = False) -> list[Result]:
    """Every alternative at every size; one that fails is named with its problem."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    end = time.monotonic() + 60 * minutes
    makers = alternatives(on_card=device.type == "cuda", interpreted=interpreted)
    results = []
    for size in ((24, 32, 200),) if toy else SIZES:
        for name, make in makers.items():
            if time.monotonic() > end:
                results.append(Result(name, size, problem="no time was left"))
                continue
            try:
                run = make()
                found = precision(run, size[1], size[2], device) | speed(run, size, device, repeats=3 if toy else 10)
                results.append(Result(name, size, **found))
            except Exception as problem:  # a foreign kernel may raise anything: its row says what, the rest goes on
                lines = str(problem).splitlines() or [""]
                results.append(Result(name, size, problem=f"{type(problem).__name__}: {lines[0][:160]}"))
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--toy", action="store_true")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    results = measure(minutes=args.minutes, toy=args.toy)
    rows = [{**vars(result), "passes": result.passes} for result in results]
    timed = [row for row in rows if row["passes"] and row["size"] == rows[0]["size"]]
    best = min(timed, key=lambda row: row["milliseconds"], default=None)
    summary = f"fastest that passes: {best['name']}, {best['milliseconds']:.2f} ms" if best else "none passes"
    print(json.dumps({"rows": rows, "summary": summary}))


if __name__ == "__main__":
    main()
