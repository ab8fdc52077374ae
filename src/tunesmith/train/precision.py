"""Precision: which type the forward pass computes in, and the scale that keeps float16 gradients alive.

In: the type that the recipe asks for, the device. Out: the engine's autocast type, and a gradient scaler.
Must not know: data, objectives, files.

Trained weights, moments, log-softmax and every sum are float32 whatever the forward pass computes in. float16 has five
bits of exponent: small gradients vanish and large ones overflow, so the loss is scaled up before the backward pass and
the gradients down again after it (Micikevicius et al. 2018, arXiv:1710.03740). A step whose gradients overflow is
skipped, and the scale is halved.
"""

from __future__ import annotations

import torch
from torch.amp import GradScaler

from tunesmith.errors import NumericsError, RecipeError

MAX_SKIPS = 25
"""Skipped steps in a row that still can be a scale that is too high: 25 halvings take the first one below 1/500."""


def autocast_of(dtype: torch.dtype, device: torch.device) -> torch.dtype | None:
    """What `Engine.autocast` must be so that the forward pass computes in `dtype`; None for float32.

    Raises RecipeError where the card would only emulate bfloat16: slower than float32, and no more precise.
    """
    if dtype == torch.float32:
        return None
    if (
        dtype == torch.bfloat16
        and device.type == "cuda"
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        name = torch.cuda.get_device_name(device)
        remedy = "Set `model.dtype: auto` (float16 with a scaled loss, here), or `float32`."
        raise RecipeError(f"{name} does not compute in bfloat16.", where="model.dtype", remedy=remedy)
    return dtype


def make_scaler(dtype: torch.dtype, device: torch.device) -> GradScaler:
    """The gradient scaler of a forward pass in `dtype`; it does nothing but for float16."""
    scaler = GradScaler(device.type, enabled=dtype == torch.float16)
    scaler.scale(torch.zeros((), device=device))  # it has a scale from here on, also on a rank without rows
    return scaler


def refuse_endless_skips(num_skips: int, scale: float, *, where: str) -> None:
    """NumericsError where more than 25 steps in a row were skipped."""
    if num_skips <= MAX_SKIPS:
        return
    what = (
        f"the gradients overflowed float16 in {num_skips} steps in a row, down to a loss scale of {scale:g}. Causes: "
        "a model that was trained in bfloat16, whose activations float16 cannot hold; a learning rate that destroyed "
        "the weights; rows that give gradients that are not finite in any type."
    )
    remedy = "Set `model.dtype: float32` (or bfloat16 where the card has it), or lower `learning_rate`."
    raise NumericsError(what, where=where, remedy=remedy)
