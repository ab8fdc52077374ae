"""A model from its configuration alone: layers, adapter and quantization in their shapes, without a weight.

In: what the recipe says of the model, the tuning. Out: a transformers model on the `meta` device, and what its weights
take. Must not know: data, stages, what a pass needs.

Quantized layers stay plain ones here: what they make is the same, but for one weight at a time that is dequantized,
whose bytes are said apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from tunesmith.errors import ModelError
from tunesmith.model.adapters import add_adapter, inner_model
from tunesmith.model.added_tokens import make_room
from tunesmith.model.chosen import choose_trained
from tunesmith.model.load import load_config, load_extended_tokenizer, model_folder, quiet_transformers
from tunesmith.model.reward import score_layer
from tunesmith.model.whole import tables_of
from tunesmith.recipe.models import Full, Lora, Model

NF4_BLOCK = 64
"""Weights that share one scale."""
NF4_SCALES_BLOCK = 256
"""Scales that share one float32: double quantization keeps a scale in one byte."""
NF4_TABLES_BYTES = 4 * (16 + 256 + 1)
"""Of every layer: the values of 4 bits, those of 8, and the scales' mean."""


@dataclass(frozen=True, slots=True)
class TrainedShape:
    """The shape of a trained tensor. `is_table`: it has a row a token, as embeddings and head."""

    shape: tuple[int, ...]
    is_table: bool = False


@dataclass(frozen=True, slots=True)
class WeightBytes:
    """What the weights take, and how many numbers they are; of the trained ones the size of every tensor.

    dequantized: bytes of the largest quantized weight in the forward's type, which lives for the time of a product.
    shapes: of every trained tensor, for optimizers whose state depends on more than its size.
    """

    frozen: int
    trained: int
    num_frozen: int
    num_trained: int
    trained_sizes: tuple[int, ...]
    dequantized: int
    shapes: tuple[TrainedShape, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Shapes:
    """A model without values, and its weights' bytes."""

    model: PreTrainedModel
    weights: WeightBytes


def quantized_bytes(num_out: int, num_in: int, bits: int) -> int:
    """Bytes of a quantized weight: NF4 with double quantization, or 8 bits with a float32 scale a row."""
    count = num_out * num_in
    if bits == 8:
        return count + 4 * num_out
    blocks = -(-count // NF4_BLOCK)
    return (count + 1) // 2 + blocks + 4 * -(-blocks // NF4_SCALES_BLOCK) + NF4_TABLES_BYTES


def shapes_for_training(model: Model, tuning: Lora | Full, *, dtype: torch.dtype, scores: bool = False) -> Shapes:
    """The model of a stage on the `meta` device, its adapter on it; needs config.json and the tokenizer only.

    `scores`: as a reward model.
    """
    full = isinstance(tuning, Full)
    tokenizer, added = load_extended_tokenizer(model)
    built = _from_config(model, torch.float32 if full else dtype, scores=scores)
    with quiet_transformers(), torch.device("meta"):
        make_room(built, len(tokenizer), added)
    stored = {"none": {}, "nf4": _quantized(built, 4), "int8": _quantized(built, 8)}[model.quantization]
    if isinstance(tuning, Full):
        for parameter in built.parameters():
            parameter.requires_grad_(True)
        choose_trained(built, train_only=tuning.train_only, freeze=tuning.freeze)
    else:
        with torch.device("meta"):
            built = inner_model(add_adapter(built, tuning, seed=0, added=added))
        for parameter in built.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return Shapes(built, weight_bytes(built, stored))


def _from_config(model: Model, dtype: torch.dtype, *, scores: bool) -> PreTrainedModel:
    folder = model_folder(model)
    config, with_code = load_config(model)
    loader = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    if scores:
        config.num_labels = 1
    try:
        with quiet_transformers(), torch.device("meta"):
            built = loader.from_config(config, dtype=dtype, trust_remote_code=with_code)  # type: ignore[no-untyped-call]
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, ImportError) as problem:
        raise ModelError(
            f"the model cannot be built from its configuration: {str(problem).splitlines()[0]}",
            where=str(folder),
            remedy="Check config.json; models that bring their own code are not run.",
        ) from problem
    assert isinstance(built, PreTrainedModel)
    built.eval()
    return built


def _quantized(model: PreTrainedModel, bits: int) -> dict[int, int]:
    """Stored bytes of the weights that are quantized, by identity: of every linear layer but the head."""
    head = model.get_output_embeddings() or score_layer(model)
    layers = [module for module in model.modules() if type(module) is nn.Linear and module is not head]
    return {id(layer.weight): quantized_bytes(layer.out_features, layer.in_features, bits) for layer in layers}


def weight_bytes(model: nn.Module, stored: Mapping[int, int] | None = None) -> WeightBytes:
    """Bytes of every weight and buffer, tied ones once; `stored`: of the quantized ones, by identity."""
    quantized = stored or {}
    parameters, tables = list(model.parameters()), tables_of(model)
    frozen = [each for each in parameters if not each.requires_grad]
    trained = [each for each in parameters if each.requires_grad]
    widened = [each.numel() * _DEQUANTIZED[each.dtype] for each in frozen if id(each) in quantized]
    return WeightBytes(
        frozen=sum(quantized.get(id(each), _bytes(each)) for each in frozen) + sum(map(_bytes, set(model.buffers()))),
        trained=sum(map(_bytes, trained)),
        num_frozen=sum(each.numel() for each in frozen),
        num_trained=sum(each.numel() for each in trained),
        trained_sizes=tuple(each.numel() for each in trained),
        shapes=tuple(TrainedShape(tuple(each.shape), id(each) in tables) for each in trained),
        dequantized=max(widened, default=0),
    )


_DEQUANTIZED = {torch.float32: 4, torch.bfloat16: 2, torch.float16: 2}
"""Bytes a number of a weight that is dequantized for a product."""


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
