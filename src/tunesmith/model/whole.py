"""Embeddings and head that are trained whole beside an adapter: peft's `modules_to_save`.

In: a model, the recipe's choice. Out: their names for peft; copies in float32 that compute in the model's own type.
Must not know: data, stages, files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from tunesmith.errors import ModelError
from tunesmith.model.added_tokens import AddedTokens
from tunesmith.model.reward import score_layer
from tunesmith.recipe.tuning import Whole


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the head's matrix is the embeddings'."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    return isinstance(head, nn.Module) and embeddings.weight is head.weight


def tables_of(model: nn.Module) -> set[int]:
    """Ids of the weights with a row a token, position or label: embeddings, the LM head, a reward model's head."""
    layers: list[nn.Module | None] = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    layers.append(score_layer(model))
    if isinstance(model, PreTrainedModel):
        layers += [model.get_input_embeddings(), model.get_output_embeddings()]
    return {id(parameter) for layer in layers if layer is not None for parameter in layer.parameters()}


def whole_names(
    model: PreTrainedModel, whole: Sequence[Whole], *, added: AddedTokens, target_modules: str | list[str]
) -> list[str]:
    """Names of the layers for peft: of a tied pair the embeddings' alone, with which peft then ties the head.

    Raises ModelError where an added token would have a row that is not trained, or a layer would have an adapter too.
    """
    if not whole:
        return []
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None and "head" in whole:
        remedy = "Leave it out of modules_to_save."
        raise ModelError("a reward model's head is trained in any case", where="tuning.modules_to_save", remedy=remedy)
    if head is None or is_tied(model):
        wanted = [embeddings]
    elif added.ids and len(whole) < 2:
        names = ", ".join(added.names)
        raise ModelError(
            f"the added tokens {names} need rows in the embeddings and in the head, and only one of them is trained",
            where="tuning.modules_to_save",
            remedy="Name both, embeddings and head, or none: then the new rows alone are trained.",
        )
    else:
        wanted = [module for name, module in (("embeddings", embeddings), ("head", head)) if name in whole]
    names_of = {module: name for name, module in model.named_modules() if module is embeddings or module is head}
    named = [names_of[module] for module in wanted]
    targets = [target_modules] if isinstance(target_modules, str) else target_modules
    both = [name for name in names_of.values() if any(name == each or name.endswith(f".{each}") for each in targets)]
    if both:
        raise ModelError(
            f"{both[0]} is in tuning.target_modules, and a layer that is trained whole has no adapter",
            where="tuning.modules_to_save",
            remedy="Leave it out of one of the two.",
        )
    return named


def _wrappers(model: nn.Module) -> Iterator[ModulesToSaveWrapper]:
    return (module for module in model.modules() if isinstance(module, ModulesToSaveWrapper))


def widen_whole(model: nn.Module) -> None:
    """Make the trained copies float32; in a coarser model they take and give that model's type as before."""
    for wrapper in _wrappers(model):
        dtype = wrapper.original_module.weight.dtype
        assert isinstance(dtype, torch.dtype)
        if dtype == torch.float32:
            continue
        for layer in wrapper.modules_to_save.values():
            layer.float()
            if isinstance(layer, nn.Linear):
                layer.register_forward_pre_hook(_widened)
            layer.register_forward_hook(partial(_as_before, dtype))


def narrow_whole(model: nn.Module) -> None:
    """For reading: the copies in the type of what they stand for."""
    for wrapper in _wrappers(model):
        wrapper.modules_to_save.to(wrapper.original_module.weight.dtype)


def _widened(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(each.float() if each.is_floating_point() else each for each in inputs)


def _as_before(dtype: torch.dtype, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output.to(dtype)
