"""Models with random weights, made on the device: no hub, no disk, never more than one float matrix over the result.

In: a shape, a device, a type, a seed. Out: a transformers model, and adapters with the same first values for everyone.
Must not know: who trains it.

Every linear layer of an NF4 model is drawn, quantized and dropped before the next one is drawn, so that a model can
be made within the memory that it will be trained in. The same seed on the same kind of device draws the same weights
in every process.
"""

from __future__ import annotations

import zlib

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.gpu.shapes import ModelShape, Quantization

STD = 0.02
"""Of every matrix; small enough that fifty layers of random weights stay finite in float16."""


def _draw(parameter: Tensor, name: str, *, device: torch.device, dtype: torch.dtype, seed: int) -> Tensor:
    """Values that depend on the seed and the name alone: matrices random, norms 1, biases 0."""
    if parameter.ndim >= 2:
        generator = torch.Generator(device).manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
        return torch.empty(parameter.shape, dtype=dtype, device=device).normal_(0.0, STD, generator=generator)
    fill = torch.zeros if name.endswith("bias") else torch.ones
    return fill(parameter.shape, dtype=dtype, device=device)


def _quantized(linear: nn.Linear, weight_OI: Tensor) -> nn.Module:
    """bitsandbytes' layer: NF4 with double quantization, computing in the weight's type; the bias comes later."""
    import bitsandbytes as bnb

    with torch.device("meta"):
        layer = bnb.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compute_dtype=weight_OI.dtype,
            compress_statistics=True,
            quant_type="nf4",
            quant_storage=torch.uint8,
        )
    packed = bnb.nn.Params4bit(
        weight_OI,
        requires_grad=False,
        compress_statistics=True,
        quant_type="nf4",
        quant_storage=torch.uint8,
        module=layer,
    )
    layer.weight = packed.to(weight_OI.device)  # the move to its device is what quantizes it
    assert layer.weight.dtype == torch.uint8, "bitsandbytes did not quantize"
    return layer


def _quantize_blocks(model: PreTrainedModel, *, device: torch.device, dtype: torch.dtype, seed: int) -> None:
    """Put NF4 layers in the place of all linear layers but the head."""
    from transformers import BitsAndBytesConfig
    from transformers.quantizers import AutoHfQuantizer

    head = model.get_output_embeddings()
    linears = [(name, module) for name, module in model.named_modules() if type(module) is nn.Linear]
    for name, module in linears:
        if module is head:
            continue
        weight_OI = _draw(module.weight, f"{name}.weight", device=device, dtype=dtype, seed=seed)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, _quantized(module, weight_OI))
    # What transformers leaves on a model that it has quantized itself; peft, TRL and Tunesmith look at it.
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    model.config.quantization_config = settings
    model.hf_quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=True)
    model.quantization_method = settings.quant_method
    model.is_loaded_in_4bit = True
    model.is_quantized = True


def make_model(
    shape: ModelShape,
    *,
    device: torch.device,
    dtype: torch.dtype,
    quantization: Quantization = "none",
    attention: str | None = None,
    seed: int = 0,
) -> PreTrainedModel:
    """A frozen model in eval mode. `attention` is transformers' name of one; None leaves the choice to it."""
    config = shape.config()
    config.dtype = dtype
    settings = {} if attention is None else {"attn_implementation": attention}
    with init_empty_weights(include_buffers=False):  # buffers (rotary frequencies) are made as they should be
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, **settings)
    model.config.name_or_path = shape.name
    if quantization == "nf4":
        _quantize_blocks(model, device=device, dtype=dtype, seed=seed)
    for name, module in model.named_modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                values = _draw(parameter, f"{name}.{key}", device=device, dtype=dtype, seed=seed)
                module.register_parameter(key, nn.Parameter(values, requires_grad=False))
    model.tie_weights()
    for buffer_name, buffer in list(model.named_buffers()):
        parent, _, child = buffer_name.rpartition(".")
        assert not buffer.is_meta, buffer_name
        if "weight" not in child:  # bitsandbytes keeps its statistics beside the weight
            model.get_submodule(parent)._buffers[child] = buffer.to(device)
    model.requires_grad_(False)
    assert model.generation_config is not None
    return model.eval()


@torch.no_grad()
def fill_adapter(model: nn.Module, *, seed: int) -> int:
    """Give every first matrix of an adapter values that depend on the seed and its place alone, and every second
    one zeros; returns how many matrices there are. Both sides then start from the same adapter."""
    count = 0
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            continue
        place = name[name.index("layers.") :].replace(".default", "").replace("base_layer.", "")
        parameter.zero_()
        if "lora_A" in name:
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{place}".encode()))
            bound = parameter.shape[1] ** -0.5
            values = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
            parameter.copy_(values)
        count += 1
    return count
