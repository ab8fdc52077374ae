"""Which kernels can attend over forests here, in order of speed, and why the others cannot.

In: facts of the device and of the model. Out: for every kernel an obstacle, or none; the kernels to try.
Whether a kernel is right is for the parity check to say. Must not know: trees, objectives, files, how kernels compute.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from tunesmith.engine import varlen
from tunesmith.engine.layout import Kernel
from tunesmith.errors import ModelError

Attention = Literal["auto", "varlen", "flex", "sdpa", "plain"]
"""What a recipe may ask for."""

BY_SPEED: tuple[Kernel, ...] = ("varlen", "flex", "sdpa")
AMPERE = (8, 0)
"""The first compute capability that flash kernels are built for; a T4 has 7.5, a V100 7.0."""
LARGEST_HEAD = 256
HEAD_STEP = 8
SMALLEST_FLEX_HEAD = 16
"""What the kernels take as the size of a head: flash up to 256 in steps of 8, FlexAttention's from 16 on."""
MIXING = frozenset(
    "conv linear_attention mamba mamba2 recurrent hybrid hybrid_sliding indexed_attention "
    "compressed_sparse_attention heavily_compressed_attention minimax_m3_sparse".split()
)
"""Kinds of layers, as transformers' configurations name them, in which tokens before it in the flat sequence act on a
token whatever attention is told: state-space, convolution, and choices among all keys."""
TABLES = frozenset({"wpe", "embed_positions", "position_embeddings", "position_embedding"})
"""Names of learned absolute positions in transformers' models."""


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """A device as kernels see it: `capability` is (0, 0) where there is no CUDA; what is installed for it."""

    type: str
    capability: tuple[int, int] = (0, 0)
    has_varlen: bool = False
    has_flash_attn: bool = False

    @classmethod
    def of(cls, device: torch.device) -> DeviceFacts:
        """The facts of a device that is there."""
        if device.type != "cuda":
            return cls(device.type)
        capability = torch.cuda.get_device_capability(device)
        return cls("cuda", capability, varlen.torch_kernel() is not None, varlen.has_flash_attn())


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """A model as kernels see it: what it computes in, its heads' size (None: unknown), and whether it is trained."""

    dtype: torch.dtype
    head_size: int | None
    soft_capped: bool = False
    trained: bool = True

    @classmethod
    def of(cls, model: PreTrainedModel, *, autocast: torch.dtype | None = None) -> ModelFacts:
        """The facts of a loaded model; `autocast` is the engine's, in which its attention will compute."""
        config = model.config.get_text_config()
        values = config.to_dict()
        names = {name: values.get(config.attribute_map.get(name, name)) for name in ("hidden_size", "head_dim")}
        heads = values.get(config.attribute_map.get("num_attention_heads", "num_attention_heads"))
        size = names["head_dim"]
        if size is None and names["hidden_size"] and isinstance(heads, int):
            size = names["hidden_size"] // heads
        capped = values.get("attn_logit_softcapping") is not None
        trained = any(parameter.requires_grad for parameter in model.parameters())
        return cls(autocast or model.dtype, size, capped, trained)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def obstacle(kernel: Kernel, device: DeviceFacts, model: ModelFacts) -> str:
    """Why the kernel cannot run this model on this device; empty where it can."""
    if kernel == "sdpa":
        return ""
    if kernel == "flex":
        return _flex_obstacle(device, model)
    if device.type != "cuda":
        return "needs a CUDA device"
    if device.capability < AMPERE:
        major, minor = device.capability
        return f"needs compute capability 8.0, and this card has {major}.{minor}"
    if model.dtype not in varlen.HALF:
        return f"needs bfloat16 or float16, and the model computes in {_name(model.dtype)}"
    if model.head_size is not None and (model.head_size > LARGEST_HEAD or model.head_size % HEAD_STEP):
        return f"needs heads of at most {LARGEST_HEAD} in steps of {HEAD_STEP}, and this model's have {model.head_size}"
    if model.soft_capped and not device.has_flash_attn:
        return "the scores are soft-capped, which torch's kernel cannot do and the package flash-attn can"
    if not device.has_varlen and not device.has_flash_attn:
        return "needs torch 2.11 or the package flash-attn"
    return ""


def _flex_obstacle(device: DeviceFacts, model: ModelFacts) -> str:
    if device.type == "cpu":
        return "computes no backward on a CPU" if model.trained else ""
    if device.type != "cuda":
        return "needs a CUDA device"
    if device.capability < AMPERE:
        major, minor = device.capability
        return f"needs compute capability 8.0, and this card has {major}.{minor}"
    if model.head_size is not None and model.head_size < SMALLEST_FLEX_HEAD:
        return f"needs heads of at least {SMALLEST_FLEX_HEAD}, and this model's have {model.head_size}"
    return ""


def usable(model: PreTrainedModel, *, autocast: torch.dtype | None = None) -> list[tuple[Kernel, str]]:
    """Every kernel, the fastest first, with the reason why it cannot run this model here; empty where it can."""
    device, facts = DeviceFacts.of(model.device), ModelFacts.of(model, autocast=autocast)
    return [(kernel, obstacle(kernel, device, facts)) for kernel in BY_SPEED]


def candidates(
    attention: Attention, device: DeviceFacts, model: ModelFacts
) -> tuple[list[Kernel], list[tuple[Kernel, str]]]:
    """The kernels to try in this order, and those that are left out, with the reason.

    `auto` takes flash kernels and FlexAttention only in half precision on cards that are built for it; elsewhere
    `sdpa`, which has a kernel for every device and type. `plain` has nothing to try. A named kernel that cannot run
    here raises ModelError.
    """
    if attention == "plain":
        return [], []
    if attention != "auto":
        reason = obstacle(attention, device, model)
        if reason:
            raise refusal(attention, reason)
        return [attention], []
    found = [(kernel, obstacle(kernel, device, model)) for kernel in BY_SPEED]
    if device.type != "cuda" or model.dtype not in varlen.HALF:
        slow = "needs a CUDA device" if device.type != "cuda" else f"not taken by itself in {_name(model.dtype)}"
        found = [(kernel, slow if kernel == "flex" else reason) for kernel, reason in found]
    return [kernel for kernel, reason in found if not reason], [each for each in found if each[1]]


def refusal(attention: Attention, reason: str) -> ModelError:
    """What is said of a kernel that the recipe names and that cannot be used."""
    remedy = "Set `attention: auto`, which takes the fastest that is right here"
    remedy += "." if attention == "sdpa" else ", or `attention: sdpa`, which runs on every device."
    return ModelError(f"attention {attention} cannot be used: {reason}", where="model.attention", remedy=remedy)


def no_forests(model: PreTrainedModel, longest: int) -> str:
    """Why no kernel can run forests of this model, with rows of up to `longest` tokens; empty where none is known.

    What the configuration does not tell is for the parity check to find.
    """
    values = model.config.get_text_config().to_dict()
    kinds = set(values.get("layer_types") or [])
    if kinds & MIXING:
        return f"it has layers of the kind {', '.join(sorted(kinds & MIXING))}, which mix along the sequence"
    if any(name.split(".")[-1] == "sinks" for name, _ in model.named_parameters()):
        return "it has attention sinks"
    chunk = values.get("attention_chunk_size")
    if "chunked_attention" in kinds and chunk is not None and longest > chunk:
        return f"it attends in chunks of {chunk} tokens, and the longest row has {longest}"
    return ""


def num_positions(model: PreTrainedModel) -> int | None:
    """Rows of the model's table of learned absolute positions; None where it has none."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.split(".")[-1] in TABLES:
            known = model.config.get_text_config().max_position_embeddings
            return min(int(known), module.num_embeddings)  # OPT's table has two rows more than positions
    return None
