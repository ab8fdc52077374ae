"""A LoRA layer in one autograd function: nothing of the output's size is made beside the output.

In: peft's LoRA layer on a plain linear layer. Out: the same numbers, with the product of the low-rank matrices added
in place. It is handed to peft as the layer for `nn.Linear` (its custom-module mapping); whatever is not the plain
case (dropout, DoRA, merged, disabled or several adapters, mixed types) runs peft's own forward.
Must not know: models, training.

Shapes: T tokens, I inputs, O outputs, R rank.
"""

from __future__ import annotations

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.nn.functional import linear


class _LowRankLinear(torch.autograd.Function):
    """y = x W^T + b + scale * (x A^T) B^T, with W and b frozen (Hu et al. 2021, equation 3)."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x_TI: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        a_RI: Tensor,
        b_OR: Tensor,
        scale: float,
    ) -> Tensor:
        """[T, O]."""
        low_TR = x_TI @ a_RI.T
        y_TO = linear(x_TI, weight_OI, bias_O).addmm_(low_TR, b_OR.T, alpha=scale)
        ctx.save_for_backward(x_TI, low_TR, weight_OI, a_RI, b_OR)
        ctx.scale = scale  # type: ignore[attr-defined]
        return y_TO

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad_TO: Tensor
    ) -> tuple[Tensor | None, None, None, Tensor, Tensor, None]:
        """Gradients of x, A and B."""
        x_TI, low_TR, weight_OI, a_RI, b_OR = ctx.saved_tensors  # type: ignore[attr-defined]
        grad_TR = (grad_TO @ b_OR).mul_(ctx.scale)  # type: ignore[attr-defined]
        grad_a_RI = grad_TR.T @ x_TI
        grad_b_OR = (grad_TO.T @ low_TR).mul_(ctx.scale)  # type: ignore[attr-defined]
        grad_x_TI = None
        if ctx.needs_input_grad[0]:  # type: ignore[attr-defined]
            grad_x_TI = (grad_TO @ weight_OI).addmm_(grad_TR, a_RI)
        return grad_x_TI, None, None, grad_a_RI, grad_b_OR, None


class FusedLinear(Linear):
    """peft's LoRA layer; its plain case runs as one function."""

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """[..., O] from [..., I]."""
        name = self._plain_adapter(x)
        base = self.base_layer
        if name is None or args or kwargs or not isinstance(base, nn.Linear):
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        x_TI = x.reshape(-1, x.shape[-1])
        a_RI, b_OR = self.lora_A[name].weight, self.lora_B[name].weight
        y_TO: Tensor = _LowRankLinear.apply(x_TI, base.weight, base.bias, a_RI, b_OR, self.scaling[name])  # type: ignore[no-untyped-call]
        return y_TO.view(*x.shape[:-1], y_TO.shape[-1])

    def _plain_adapter(self, x: Tensor) -> str | None:
        """The one active adapter where nothing but the two products is asked for, else None."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        if len(names) != 1 or self.disable_adapters or self.merged or self.lora_variant or self.fan_in_fan_out:
            return None
        (name,) = names
        base, low = self.base_layer, self.lora_A[name].weight
        if type(base) is not nn.Linear or base.weight.requires_grad or self.lora_B[name].bias is not None:
            return None
        if not isinstance(self.lora_dropout[name], nn.Identity) and self.lora_dropout[name].training:
            return None
        autocast = torch.is_autocast_enabled(x.device.type)
        return None if autocast or not x.dtype == base.weight.dtype == low.dtype else name
