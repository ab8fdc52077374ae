"""Proofs about log-probs: as exact as float32 allows, and no coarser in half precision than its logits are.

In: a device and the type that it computes in. Out: proofs. Must not know: models, attention, files.

Shapes: N trained tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from tunesmith.engine.head import Head
from tunesmith.engine.logprobs import token_logprobs
from tunesmith.selftest.proof import Proof, worst_gradient

EXACT = 1e-5
"""Relative to float64, of every log-prob and of the gradients."""
NATS_A_SEQUENCE = 1e-2
"""Of a sequence of `TOKENS` log-probs, against float32 on the same logits: a bfloat16 softmax is off by a nat."""
TOKENS, HIDDEN, VOCABULARY = 512, 64, 9000  # the vocabulary is no multiple of a tile
SPREAD = 3.0
"""Standard deviation of the logits: a sure token now and then, as in a trained model."""

HEADS = {
    "frozen head": (False, None),
    "trained head": (True, None),
    "frozen head, soft-capped": (False, 30.0),
    "trained head, soft-capped": (True, 30.0),
}


def precision_proofs(device: torch.device, dtype: torch.dtype) -> Iterator[Proof]:
    """Every kind of head in float32, and the sum over a sequence in half precision."""
    for name, (trained, softcap) in HEADS.items():
        yield from _float32_proofs(name, device, trained=trained, softcap=softcap)
    half = torch.float16 if dtype == torch.float16 else torch.bfloat16
    yield _half_proof(device, half)


def _case(device: torch.device, dtype: torch.dtype, softcap: float | None) -> tuple[Head, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(11)
    module = nn.Linear(HIDDEN, VOCABULARY, bias=False)
    hidden_NH = torch.randn(TOKENS, HIDDEN, generator=draw)
    with torch.no_grad():
        module.weight.copy_(torch.randn(VOCABULARY, HIDDEN, generator=draw) * (SPREAD / HIDDEN**0.5))
    target_N = torch.randint(0, VOCABULARY, (TOKENS,), generator=draw).to(device)
    return Head(module.to(device, dtype), softcap=softcap), hidden_NH.to(device, dtype).requires_grad_(), target_N


def _float32_proofs(name: str, device: torch.device, *, trained: bool, softcap: float | None) -> Iterator[Proof]:
    head, hidden_NH, target_N = _case(device, torch.float32, softcap)
    head.module.requires_grad_(trained)
    weights_N = torch.linspace(-1, 2, TOKENS, device=device)
    leaves = {"hidden": hidden_NH, "head": head.weight_VH} if trained else {"hidden": hidden_NH}

    exact = {"hidden": hidden_NH.detach().cpu().double(), "head": head.weight_VH.detach().cpu().double()}
    exact = {key: exact[key].requires_grad_(key in leaves) for key in exact}
    logits_NV = exact["hidden"] @ exact["head"].T
    if softcap is not None:
        logits_NV = softcap * torch.tanh(logits_NV / softcap)
    expected_N = logits_NV.log_softmax(-1).gather(-1, target_N.cpu()[:, None]).squeeze(-1)
    expected = torch.autograd.grad((expected_N * weights_N.cpu()).sum(), [exact[key] for key in leaves])

    found_N = token_logprobs(hidden_NH, target_N, head)
    found = torch.autograd.grad((found_N * weights_N).sum(), list(leaves.values()))
    error_N = (found_N.detach().cpu().double() - expected_N.detach()).abs() / expected_N.detach().abs().clamp(min=1)
    compared = f"{TOKENS} log-probs against a float64 softmax"
    yield Proof(f"{name}: log-probs", compared, float(error_N.max()), EXACT)
    gradients = (dict(zip(leaves, tensors, strict=True)) for tensors in (found, expected))
    yield Proof(f"{name}: gradient", compared, worst_gradient(*gradients), EXACT)


@torch.no_grad()
def _half_proof(device: torch.device, dtype: torch.dtype) -> Proof:
    head, hidden_NH, target_N = _case(device, dtype, None)
    logits_NV = head.logits(hidden_NH).float()
    expected_N = logits_NV.log_softmax(-1).gather(-1, target_N[:, None]).squeeze(-1)
    found_N = token_logprobs(hidden_NH, target_N, head)
    name = str(dtype).removeprefix("torch.")
    compared = f"nats over {TOKENS} tokens, float32 on the same logits"
    error = abs(float(found_N.double().sum() - expected_N.double().sum()))
    return Proof(f"{name} inputs: log-probs", compared, error, NATS_A_SEQUENCE)
