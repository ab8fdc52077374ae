"""Quantized base weights: bitsandbytes' NF4 and 8-bit layers, and their weights as plain matrices.

In: the recipe's choice; a linear layer. Out: transformers' settings to load with; the matrix that a layer stands for,
made when it is asked for and never kept. bitsandbytes is imported only where a quantized model is.
Must not know: adapters, training, where weights lie.

NF4 with double quantization is Dettmers et al. 2023 (QLoRA). 8-bit weights are rounded row by row, as in LLM.int8()
(Dettmers et al. 2022). Differs: activations are not rounded. LLM.int8() picks the columns that it leaves unrounded
from all tokens of a batch, so one tree's log-probs would depend on its neighbours in a forest, and bitsandbytes
computes otherwise in train and in eval mode on a CPU; on dequantized weights neither holds, and merging is exact.

Shapes: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from tunesmith.recipe.extras import need_extra

Quantization = Literal["nf4", "int8"]


def loading_settings(kind: Quantization, dtype: torch.dtype) -> object:
    """What `from_pretrained` takes as `quantization_config`. Raises MissingExtraError without bitsandbytes."""
    need_extra("bitsandbytes", "gpu")
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def is_quantized(model: PreTrainedModel) -> bool:
    """Whether the model was loaded with quantized weights, or saved so."""
    return model.config.to_dict().get("quantization_config") is not None


def prepare_layers(model: PreTrainedModel) -> None:
    """Make a freshly loaded quantized model compute the same in every mode, with a gradient to its inputs."""
    four_bit, eight_bit = quantized_layers()
    for module in model.modules():
        if isinstance(module, four_bit):
            # In a scoring pass on a CPU with AVX512-BF16 it would repack its weights for good, and a repacked layer
            # hands no gradient on.
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
        elif isinstance(module, eight_bit):
            module.__class__ = _linear_8bit()  # a subclass that adds nothing but `forward`


def matrix(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """The weight [O, I] that a quantized layer stands for, made anew at each call."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn.modules import Int8Params, Linear8bitLt, Params4bit

    weight = layer.weight
    if isinstance(weight, Params4bit):
        made_OI: Tensor = dequantize_4bit(weight.data, weight.quant_state)
        return made_OI.to(dtype)
    assert isinstance(layer, Linear8bitLt)
    # the scales lie with the weight until a forward of bitsandbytes' own has moved them
    scale_O = weight.SCB if isinstance(weight, Int8Params) and weight.SCB is not None else layer.state.SCB
    assert isinstance(scale_O, Tensor)
    scaled_OI: Tensor = layer.weight.data * (scale_O / 127.0)[:, None]
    return scaled_OI.to(dtype)


@cache
def quantized_layers() -> tuple[type[nn.Module], type[nn.Module]]:
    """bitsandbytes' 4-bit and 8-bit linear layers."""
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

    return Linear4bit, Linear8bitLt


class _Dequantized(torch.autograd.Function):
    """y = x W^T + b, with W made for the forward and made again for the backward."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, layer: nn.Linear) -> Tensor:
        """[..., O] from [..., I]."""
        ctx.layer = layer  # type: ignore[attr-defined]
        bias_O = None if layer.bias is None else layer.bias.to(x.dtype)
        return linear(x, matrix(layer, x.dtype), bias_O)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        """Gradient of x."""
        return grad @ matrix(ctx.layer, grad.dtype), None  # type: ignore[attr-defined]


@cache
def _linear_8bit() -> type[nn.Module]:
    from bitsandbytes.nn.modules import Linear8bitLt

    class Linear8bit(Linear8bitLt):  # type: ignore[misc]  # bitsandbytes has no types
        """bitsandbytes' 8-bit layer, computing with its dequantized weight."""

        def forward(self, x: Tensor) -> Tensor:
            """[..., O] from [..., I]."""
            if torch.is_autocast_enabled(x.device.type):
                x = x.to(torch.get_autocast_dtype(x.device.type))
            y: Tensor = _Dequantized.apply(x, self)  # type: ignore[no-untyped-call]
            return y

    return Linear8bit
