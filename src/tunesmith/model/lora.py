"""A LoRA layer in one autograd function: nothing of the output's size is made beside the output.

In: peft's LoRA layer on a linear layer, plain or quantized. Out: the same numbers, with the product of the low-rank
matrices added in place. It is handed to peft as the layer for linear layers (its custom-module mapping); whatever is
not the plain case (dropout, DoRA, merged, disabled or several adapters) runs peft's own forward.
Must not know: models, training.

Types: everything is computed in the type of x and W (under autocast: in its type); A and B may be float32, and get
their gradients in float32 sums. What is kept for the backward is x as it was multiplied, where peft keeps a float32
copy of it in each layer, and never a dequantized W.

Shapes: T tokens, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from functools import cache

import torch
from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor, nn
from torch.nn.functional import linear

from tunesmith.model.quantized import matrix, quantized_layers

_HALVES = (torch.bfloat16, torch.float16)


def _sum_of_products(left_MT: Tensor, right_TK: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right in `dtype`, half-precision factors summed up in float32 and not rounded in between."""
    if left_MT.dtype not in _HALVES:
        return (left_MT @ right_TK).to(dtype)
    if left_MT.is_cuda:
        return torch.mm(left_MT, right_TK, out_dtype=torch.float32).to(dtype)
    return (left_MT.float() @ right_TK.float()).to(dtype)  # a CPU has no product of two halves into a float32


class _LowRankLinear(torch.autograd.Function):
    """y = x W^T + b + scale * (x A^T) B^T, with W and b frozen (Hu et al. 2021, equation 3).

    Without `weight_OI` the first two terms are the frozen `layer`'s, whose weight the backward dequantizes again.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x_TI: Tensor,
        weight_OI: Tensor | None,
        bias_O: Tensor | None,
        a_RI: Tensor,
        b_OR: Tensor,
        scale: float,
        layer: nn.Module | None,
    ) -> Tensor:
        """[T, O], in the type of x; called outside autocast."""
        dtype = x_TI.dtype
        low_TR = x_TI @ a_RI.to(dtype).T
        if weight_OI is None:
            assert layer is not None
            y_TO: Tensor = layer(x_TI)
        else:
            y_TO = linear(x_TI, weight_OI.to(dtype), None if bias_O is None else bias_O.to(dtype))
        y_TO = y_TO.addmm_(low_TR, b_OR.to(dtype).T, alpha=scale)
        ctx.save_for_backward(x_TI, low_TR, weight_OI, a_RI, b_OR)  # type: ignore[arg-type]  # None is fine
        ctx.scale, ctx.layer = scale, layer  # type: ignore[attr-defined]
        return y_TO

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad_TO: Tensor
    ) -> tuple[Tensor | None, None, None, Tensor, Tensor, None, None]:
        """Gradients of x, A and B."""
        with torch.autocast(grad_TO.device.type, enabled=False):  # a caller may still be inside his own
            grad_x_TI, grad_a_RI, grad_b_OR = _gradients(ctx, grad_TO)
        return grad_x_TI, None, None, grad_a_RI, grad_b_OR, None, None


def _gradients(ctx: torch.autograd.function.FunctionCtx, grad_TO: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
    x_TI, low_TR, weight_OI, a_RI, b_OR = ctx.saved_tensors  # type: ignore[attr-defined]
    scale, dtype = ctx.scale, grad_TO.dtype  # type: ignore[attr-defined]
    grad_TR = (grad_TO @ b_OR.to(dtype)).mul_(scale)
    grad_a_RI = _sum_of_products(grad_TR.T, x_TI, a_RI.dtype)
    grad_b_OR = _sum_of_products(grad_TO.T, low_TR, b_OR.dtype).mul_(scale)
    if not ctx.needs_input_grad[0]:  # type: ignore[attr-defined]
        return None, grad_a_RI, grad_b_OR
    frozen_OI = matrix(ctx.layer, dtype) if weight_OI is None else weight_OI.to(dtype)  # type: ignore[attr-defined]
    return (grad_TO @ frozen_OI).addmm_(grad_TR, a_RI.to(dtype)), grad_a_RI, grad_b_OR


def _fused(layer: LoraLayer, x: Tensor, *, quantized: bool) -> Tensor | None:
    """[..., O] from [..., I] in one function, or None where this is not the plain case."""
    base, name = layer.get_base_layer(), _plain_adapter(layer)
    if name is None or not (quantized or type(base) is nn.Linear) or base.weight.requires_grad:
        return None
    device, dtype = x.device.type, x.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    elif not quantized and base.weight.dtype != dtype:
        return None
    x_TI = x.to(dtype).reshape(-1, x.shape[-1])
    a_RI, b_OR, scale = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
    weight_OI, bias_O, whole = (None, None, base) if quantized else (base.weight, base.bias, None)
    with torch.autocast(device, enabled=False):
        y_TO: Tensor = _LowRankLinear.apply(x_TI, weight_OI, bias_O, a_RI, b_OR, scale, whole)  # type: ignore[no-untyped-call]
    return y_TO.view(*x.shape[:-1], y_TO.shape[-1])


def _plain_adapter(layer: LoraLayer) -> str | None:
    """The one active adapter where nothing but the two products is asked for, else None."""
    names: list[str] = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(names) != 1 or layer.disable_adapters or layer.merged or layer.lora_variant:
        return None
    (name,) = names
    dropout = layer.lora_dropout[name]
    if layer.lora_B[name].bias is not None or not (isinstance(dropout, nn.Identity) or not dropout.training):
        return None
    return name


class FusedLinear(Linear):
    """peft's LoRA layer; its plain case runs as one function."""

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """[..., O] from [..., I]."""
        fused = None if args or kwargs or self.fan_in_fan_out else _fused(self, x, quantized=False)
        if fused is not None:
            return fused
        result: Tensor = super().forward(x, *args, **kwargs)
        return result


@cache
def fused_quantized() -> dict[type[nn.Module], type[nn.Module]]:
    """The same for bitsandbytes' layers: peft's class for each of them, made where they are."""
    from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt

    def forward_of(peft_layer: type[nn.Module]) -> type[nn.Module]:
        def forward(self: nn.Module, x: Tensor, *args: object, **kwargs: object) -> Tensor:
            assert isinstance(self, LoraLayer)
            fused = None if args or kwargs else _fused(self, x, quantized=True)
            if fused is not None:
                return fused
            result: Tensor = peft_layer.forward(self, x, *args, **kwargs)
            return result

        return type(f"Fused{peft_layer.__name__}", (peft_layer,), {"forward": forward})

    four, eight = quantized_layers()
    return {four: forward_of(Linear4bit), eight: forward_of(Linear8bitLt)}
