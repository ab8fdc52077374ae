"""Adapters that do not begin at nothing: PiSSA, and LoftQ on a quantized base.

In: a new adapter of peft's. Out: the same with its first values, and for PiSSA what the base has lost, so that the
adapter is saved as a plain one on the untouched base. Must not know: files, stages, training.

PiSSA (Meng et al. 2024, arXiv:2404.02948, equations 2 to 4) trains A and B from the largest singular directions of W,
on W - s B0 A0 (s: the adapter's scale). On disk it is the plain adapter of rank 2 r that peft's own conversion makes:

    W + s [B, -B0] [A; A0] = (W - s B0 A0) + s B A

so every tool loads it on the base as it is. Read that way round, any adapter of rank 2 r can be trained on as a
PiSSA adapter of rank r without a change of what it computes.

Shapes: I inputs, O outputs, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from tunesmith.errors import ModelError
from tunesmith.model.quantized import matrix, quantized_layers

_ADAPTER = "default"
"""The name that peft gives to a model's first adapter."""
_LOST_A, _LOST_B = "lost_a_RI", "lost_b_OR"
"""Buffers of a layer of PiSSA's: A0 and B0. They are in no state dict: the adapter's file holds them its own way."""


def doubled_alpha(alpha: float, *, rslora: bool) -> float:
    """The alpha with which an adapter of twice the rank is scaled as one with `alpha` was."""
    return alpha * (math.sqrt(2) if rslora else 2)


def lora_layers(adapted: PeftModel) -> Iterator[tuple[str, LoraLayer]]:
    """Every low-rank layer with its name in the peft model."""
    return ((name, module) for name, module in adapted.named_modules() if isinstance(module, LoraLayer))


@torch.no_grad()
def remember_pissa(adapted: PeftModel) -> None:
    """After peft has made a PiSSA adapter: keep what each weight has lost, and let the adapter count as a plain one."""
    for _, layer in lora_layers(adapted):
        a_RI, b_OR = _matrices(layer)
        _lose(layer, a_RI, b_OR)
    config = adapted.peft_config[_ADAPTER]
    assert isinstance(config, LoraConfig)
    config.init_lora_weights = True  # whoever loads the file must not split the base again


def _matrices(layer: LoraLayer) -> tuple[Tensor, Tensor]:
    """A [R, I] and B [O, R]."""
    first, second = layer.lora_A[_ADAPTER], layer.lora_B[_ADAPTER]
    assert isinstance(first, nn.Linear) and isinstance(second, nn.Linear)
    return first.weight, second.weight


def _lose(layer: LoraLayer, a_RI: Tensor, b_OR: Tensor) -> None:
    assert isinstance(layer, nn.Module)
    layer.register_buffer(_LOST_A, a_RI.detach().clone(), persistent=False)
    layer.register_buffer(_LOST_B, b_OR.detach().clone(), persistent=False)


def is_pissa(adapted: PeftModel) -> bool:
    """Whether the base under the adapter has lost what PiSSA takes."""
    return any(name.endswith(f".{_LOST_A}") for name, _ in adapted.named_buffers())


def as_plain(adapted: PeftModel, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a PiSSA adapter of rank r as those of a plain one of rank 2 r on the untouched base."""
    plain, lost = dict(weights), dict(adapted.named_buffers())
    for name, _ in lora_layers(adapted):
        a, b = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
        plain[a] = torch.cat([weights[a], lost[f"{name}.{_LOST_A}"].to(weights[a])], 0)
        plain[b] = torch.cat([weights[b], -lost[f"{name}.{_LOST_B}"].to(weights[b])], 1)
    return plain


def plain_settings(adapted: PeftModel) -> dict[str, object]:
    """Of adapter_config.json what `as_plain` changes."""
    settings = adapted.peft_config[_ADAPTER].to_dict()
    alpha = doubled_alpha(float(settings["lora_alpha"]), rslora=bool(settings["use_rslora"]))
    return {"r": 2 * int(settings["r"]), "lora_alpha": int(alpha) if alpha.is_integer() else alpha}


def refuse_high_rank(adapted: PeftModel) -> None:
    """A matrix has no more singular directions than its shorter side. Raises ModelError."""
    for name, layer in lora_layers(adapted):
        shorter, rank = min(layer.in_features or 0, layer.out_features or 0), layer.r[_ADAPTER]
        if rank > shorter:
            raise ModelError(
                f"{name.removeprefix('base_model.model.')} has {shorter} singular directions, and r is {rank}",
                where="tuning.init",
                remedy="Lower r, leave the layer out of target_modules, or use `init: zero`.",
            )


@torch.no_grad()
def split_plain(adapted: PeftModel, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The first half of an adapter of rank 2 r, to be trained; the other half goes into the base (see the module)."""
    halves = dict(weights)
    for name, layer in lora_layers(adapted):
        a, b = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
        rank = layer.r[_ADAPTER]
        halves[a], lost_a_RI = weights[a].split([rank, weights[a].shape[0] - rank], 0)
        halves[b], minus_b_OR = weights[b].split([rank, weights[b].shape[1] - rank], 1)
        base = layer.get_base_layer().weight
        lost_a_RI, lost_b_OR = lost_a_RI.to(base.device), -minus_b_OR.to(base.device)
        delta_OI = layer.scaling[_ADAPTER] * lost_b_OR @ lost_a_RI
        delta = delta_OI.T if _is_transposed(layer) else delta_OI
        base.data = (base.data.float() - delta).to(base.dtype)
        _lose(layer, lost_a_RI, lost_b_OR)
    return halves


def _is_transposed(layer: LoraLayer) -> bool:
    """GPT-2's layers hold their matrix the other way round."""
    return type(layer.get_base_layer()).__name__ == "Conv1D"


@torch.no_grad()
def fill_loftq(adapted: PeftModel, original: PreTrainedModel) -> None:
    """Start a new adapter at the best rank-r approximation of what quantization took from the weights.

    LoftQ (Li et al. 2023, arXiv:2310.08659, algorithm 1) with T = 1. Differs: no further iterations, which would
    quantize other weights than the base's own, so that the adapter would fit no base that anybody has; and the product
    is divided by the adapter's scale, which the paper takes to be 1 (peft's own function leaves it out).
    """
    weights = dict(original.named_parameters())
    four_bit, _ = quantized_layers()
    for name, layer in lora_layers(adapted):
        base = layer.get_base_layer()
        if not isinstance(base, four_bit):
            continue
        own = f"{name.removeprefix('base_model.model.')}.weight"
        if own not in weights:
            raise ModelError(f"the unquantized model has no {own}", where="tuning.init", remedy="Use `init: zero`.")
        stored_OI = matrix(base, torch.float32)
        u_OK, size_K, v_KI = torch.linalg.svd(weights[own].to(stored_OI) - stored_OI, full_matrices=False)
        rank = layer.r[_ADAPTER]
        root_R = (size_K[:rank] / layer.scaling[_ADAPTER]).sqrt()
        a_RI, b_OR = _matrices(layer)
        a_RI.copy_(root_R[:, None] * v_KI[:rank])
        b_OR.copy_(u_OK[:, :rank] * root_R)
