"""Adapters: new ones, loading, saving, merging; all of it peft's, with nothing lost in silence.

In: a transformers model, LoRA settings or an adapter folder. Out: a peft model; the engine uses the transformers
model inside it, whose linear layers now carry the adapter. Must not know: data, stages, training.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from tunesmith.errors import ModelError
from tunesmith.model.adapter_init import (
    as_plain,
    doubled_alpha,
    is_pissa,
    plain_settings,
    refuse_high_rank,
    remember_pissa,
    split_plain,
)
from tunesmith.model.added_tokens import AddedTokens, fold_rows, indices_for_peft
from tunesmith.model.chosen import choose_trained
from tunesmith.model.lora import FusedLinear, fused_quantized
from tunesmith.model.quantized import is_quantized
from tunesmith.model.reward import HEAD, TASK, is_reward_adapter, refuse_reward_adapter, score_layer
from tunesmith.model.trust import check_folder, refuse_pickles
from tunesmith.model.whole import is_tied, narrow_whole, whole_names, widen_whole
from tunesmith.recipe.models import Lora
from tunesmith.runs.atomic import write_text

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


NONE_ADDED = AddedTokens()


def add_adapter(model: PreTrainedModel, lora: Lora, *, seed: int, added: AddedTokens = NONE_ADDED) -> PeftModel:
    """A new adapter, in float32, whose output is 0 until it is trained; `seed` draws its first matrices.

    With `init: pissa` it begins with a part of the weights, which the base loses. (`loftq` needs the weights from
    before quantization: `fill_loftq` puts it in.) The rows of `added` tokens in the embeddings and the head are part of
    the adapter; their other rows stay frozen unless `modules_to_save` says to train them whole.
    """
    adapted = _unchosen(model, lora, seed=seed, added=added, splits=lora.init == "pissa")
    choose_trained(inner_model(adapted), train_only=lora.train_only, freeze=lora.freeze)
    return adapted


def _unchosen(model: PreTrainedModel, lora: Lora, *, seed: int, added: AddedTokens, splits: bool) -> PeftModel:
    """A new adapter, all of it trained. On shapes alone (`meta`) there is nothing to split."""
    splits = splits and model.device.type != "meta"
    whole = whole_names(model, lora.modules_to_save, added=added, target_modules=lora.target_modules)
    config = LoraConfig(
        r=lora.r,
        # whole numbers as such: other tools read adapter_config.json, and some expect an int
        lora_alpha=int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM" if score_layer(model) is None else TASK,  # with the latter peft saves the head too
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        init_lora_weights="pissa" if splits else True,
        modules_to_save=whole or None,
        ensure_weight_tying=bool(whole) and is_tied(model),
        trainable_token_indices=None if whole else indices_for_peft(model, added, lora.target_modules),
    )
    # bitsandbytes' layers are nn.Linear too, so theirs come first; a few layers are not quantized
    layers = fused_quantized() if is_quantized(model) else {}
    config._register_custom_module({**layers, nn.Linear: FusedLinear})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            adapted = _wrapped(model, config)
        except ValueError as problem:
            raise ModelError(
                f"no adapter can be added: {str(problem).splitlines()[0][:200]}",
                where="tuning.target_modules",
                remedy="Name modules of this model, or use all-linear.",
            ) from problem
    if lora.init != "zero":
        refuse_high_rank(adapted)
    if splits:
        remember_pissa(adapted)
    widen_whole(adapted)
    return adapted


def _wrapped(model: PreTrainedModel, config: PeftConfig) -> PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft still asks transformers by an old name
        adapted: PeftModel = get_peft_model(model, config)
    return adapted


def _with_matrices(adapted: PeftModel) -> bool | Literal["auto"]:
    """Whether the embeddings and the head go whole into the adapter's file: peft decides, but not where rows of them
    or all of them are trained. Those are in the file, nothing else has changed, and peft would write both wherever a
    model has grown.
    """
    settings = adapted.active_peft_config.to_dict()
    return "auto" if settings.get("trainable_token_indices") is None and not _has_whole(settings) else False


def _weights_of(adapted: PeftModel) -> dict[str, Tensor]:
    """What the adapter's file holds."""
    weights: dict[str, Tensor] = get_peft_model_state_dict(adapted, save_embedding_layers=_with_matrices(adapted))
    return weights


def _read_weights(folder: Path) -> dict[str, Tensor]:
    if not (folder / WEIGHTS).is_file():
        if folder.is_dir():
            refuse_pickles(folder)
        raise ModelError(f"the adapter has no {WEIGHTS}", where=str(folder), remedy="Only safetensors adapters load.")
    try:
        return load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as problem:
        raise ModelError(f"the adapter cannot be read: {problem}", where=str(folder / WEIGHTS)) from problem


def _read_config(folder: Path) -> PeftConfig:
    """The adapter's settings, after its folder was found harmless. Raises ModelError."""
    if not (folder / CONFIG).is_file():
        raise ModelError(f"the folder has no {CONFIG}", where=str(folder), remedy="Give the folder of a peft adapter.")
    check_folder(folder)
    try:
        config: PeftConfig = PeftConfig.from_pretrained(str(folder))
    except MemoryError:
        raise
    except Exception as problem:  # whatever peft makes of a file that may hold anything
        reason = next(iter(str(problem).splitlines()), "") or type(problem).__name__
        remedy = "Save the adapter anew with peft, or get its folder again."
        raise ModelError(f"cannot be read: {reason}", where=str(folder / CONFIG), remedy=remedy) from problem
    return config


def adapter_settings(folder: Path) -> Mapping[str, object]:
    """What adapter_config.json says. Raises ModelError."""
    return _read_config(folder).to_dict()


def fill_adapter(adapted: PeftModel, folder: Path, *, keeps_head: bool = False, splits: bool = False) -> None:
    """Put the weights of the adapter in `folder` into `adapted`; every name and shape must be there on both sides.

    `keeps_head`: a policy's adapter for a reward model, whose own head stays. `splits`: it has twice the rank, and its
    second half goes into the base (`adapter_init`).
    """
    weights = _read_weights(folder)
    wanted = _weights_of(adapted)
    if keeps_head:
        weights = {name: tensor for name, tensor in wanted.items() if f".{HEAD}." in name} | weights
    missing, extra = sorted(set(wanted) - set(weights)), sorted(set(weights) - set(wanted))
    if missing or extra:
        shown = ", ".join((missing or extra)[:2])
        raise ModelError(
            f"the adapter does not fit: {len(missing)} tensors are missing and {len(extra)} are left over ({shown})",
            where=str(folder),
            remedy="It was made for another model or other target modules; use the recipe it was trained with.",
        )
    if splits:
        weights = split_plain(adapted, weights)
    for name, tensor in weights.items():
        if tensor.shape != wanted[name].shape:
            raise ModelError(
                f"the adapter's {name} is {tuple(tensor.shape)}, the recipe's would be {tuple(wanted[name].shape)}",
                where=str(folder),
                remedy="Set the rank r of the recipe to the adapter's, or start from the merged model.",
            )
    set_peft_model_state_dict(adapted, weights)


def continue_adapter(
    model: PreTrainedModel, lora: Lora, folder: Path, *, seed: int, added: AddedTokens = NONE_ADDED
) -> PeftModel:
    """The adapter in `folder`, to be trained on. Raises ModelError where its settings are not the recipe's."""
    saved = _read_config(folder).to_dict()
    keeps_head = _keeps_head(model, saved, folder)
    splits = lora.init == "pissa" and saved.get("r") == 2 * lora.r
    _refuse_other_kind(saved, lora, folder, splits=splits)
    rows = saved.get("trainable_token_indices")
    wanted = None if lora.modules_to_save else indices_for_peft(model, added, lora.target_modules)
    if rows != wanted:
        raise ModelError(
            f"the adapter has trained embeddings of the tokens {_listed(rows)}, the recipe adds {_listed(wanted)}",
            where=str(folder),
            remedy="Set model.chat_template as in the adapter's own run, or merge that run and start from the result.",
        )
    adapted = _unchosen(model, lora, seed=seed, added=added, splits=False)
    fill_adapter(adapted, folder, keeps_head=keeps_head, splits=splits)
    choose_trained(inner_model(adapted), train_only=lora.train_only, freeze=lora.freeze)
    return adapted


_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
"""Values of peft's `init_lora_weights` that leave the base's weights alone; others change them at each loading."""


def _refuse_other_kind(saved: Mapping[str, object], lora: Lora, folder: Path, *, splits: bool) -> None:
    """The adapter's settings must be the recipe's. Raises ModelError."""
    start = saved.get("init_lora_weights")
    if start not in _PLAIN_STARTS:
        raise ModelError(
            f"the adapter changes the base's weights when it is loaded ({start})",
            where=str(folder),
            remedy="Convert it to a plain one with peft's `path_initial_model_for_weight_conversion`, or merge it.",
        )
    alpha = doubled_alpha(lora.alpha, rslora=lora.rslora) if splits else lora.alpha
    found = saved.get("lora_alpha")
    same_alpha = isinstance(found, int | float) and math.isclose(found, alpha)
    pairs = {
        "alpha": (found, found if same_alpha else alpha),
        "rslora": (bool(saved.get("use_rslora")), lora.rslora),
        "dora": (bool(saved.get("use_dora")), lora.dora),
        "modules_to_save": (_has_whole(saved), bool(lora.modules_to_save)),
    }
    for name, (there, here) in pairs.items():
        if there != here:
            raise ModelError(
                f"the adapter has {name} {there}, the recipe says {here}",
                where=str(folder),
                remedy="One adapter runs through all stages: give every stage the same settings under `tuning`.",
            )


def _has_whole(settings: Mapping[str, object]) -> bool:
    """Whether the embeddings or the LM head are trained whole; peft lists a reward model's own head there too."""
    names = settings.get("modules_to_save")
    return isinstance(names, list | set | tuple) and bool(set(names) - {HEAD, "classifier"})


def _keeps_head(model: PreTrainedModel, saved: Mapping[str, object], folder: Path) -> bool:
    """Whether the adapter is a policy's and the model a reward model. Raises ModelError where it is the other way."""
    if score_layer(model) is None:
        refuse_reward_adapter(saved, str(folder))
        return False
    return not is_reward_adapter(saved)


def _listed(indices: object) -> str:
    ids = next(iter(indices.values()), []) if isinstance(indices, dict) else indices
    return ", ".join(str(each) for each in ids) if isinstance(ids, list) else "none"


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """The adapter in `folder` on `model`, frozen, for generation and merging."""
    config = _read_config(folder)
    keeps_head = _keeps_head(model, config.to_dict(), folder)
    config.inference_mode = True
    if keeps_head:
        config.task_type = None  # peft would look for the policy's methods
    try:
        adapted = _wrapped(model, config)
    except (ValueError, TypeError, KeyError, AttributeError, ImportError) as problem:
        reason = next(iter(str(problem).splitlines()), "") or type(problem).__name__
        remedy = "It was made for another model, or is no LoRA adapter."
        raise ModelError(f"the adapter does not fit: {reason[:200]}", where=str(folder), remedy=remedy) from problem
    fill_adapter(adapted, folder, keeps_head=keeps_head)
    fold_rows(adapted)
    narrow_whole(adapted)
    for parameter in adapted.parameters():
        parameter.requires_grad_(False)
    return adapted.eval()


def save_adapter(adapted: PeftModel, folder: Path) -> None:
    """Write the adapter as plain peft, and read it back: every tensor there, finite, of its shape and value."""
    weights = _weights_of(adapted)
    adapted.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=_with_matrices(adapted))
    changes: dict[str, object] = {}
    if is_pissa(adapted):
        weights = as_plain(adapted, weights)
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in weights.items()}
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})
        changes = plain_settings(adapted)
    _put_in_order(folder / CONFIG, changes)
    written = _read_weights(folder)
    for name, tensor in weights.items():
        kept = written.get(name)
        if kept is None or kept.numel() == 0 or not torch.equal(kept, tensor.detach().cpu()):
            raise ModelError(f"the saved adapter lost {name}", where=str(folder), remedy="Check the disk; run again.")


def _put_in_order(path: Path, changes: Mapping[str, object]) -> None:
    """peft keeps modules' names in sets, and a set's order is the process's: one adapter would have many hashes."""
    config = json.loads(path.read_text("utf-8")) | dict(changes)
    for name, value in config.items():
        if isinstance(value, list) and all(isinstance(each, str) for each in value):
            config[name] = sorted(value)
    write_text(path, json.dumps(config, indent=2, sort_keys=True) + "\n")


def inner_model(adapted: PeftModel) -> PreTrainedModel:
    """The transformers model that carries the adapter."""
    model = adapted.get_base_model()
    assert isinstance(model, PreTrainedModel)
    return model


def merged(adapted: PeftModel) -> PreTrainedModel:
    """The model with the adapter folded into its weights, which must not be quantized."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All adapters are already merged")  # trained rows are, since they were read
        folded = adapted.merge_and_unload(safe_merge=True)
    assert isinstance(folded, PreTrainedModel)
    return folded


def adapter_is_identity(model: nn.Module) -> bool:
    """True where the adapter adds exactly 0: every `lora_B` is 0, no row of the embeddings has moved, and no module
    is trained whole. False also where it cannot be told (DoRA, a merged adapter, other kinds of adapter)."""
    return all(_is_identity(module) for module in model.modules())


def _is_identity(module: nn.Module) -> bool:
    if isinstance(module, ModulesToSaveWrapper):
        return False
    if isinstance(module, TrainableTokensLayer):
        before, now = module.trainable_tokens_original, module.trainable_tokens_delta
        return not module.merged and all(torch.equal(now[name].to(before[name].dtype), before[name]) for name in now)
    if isinstance(module, LoraLayer):
        if module.merged or module.lora_variant or len(module.lora_embedding_B):
            return False
        return not any(bool(parameter.any()) for parameter in module.lora_B.parameters())
    return not isinstance(module, BaseTunerLayer)


@contextmanager
def without_adapter(model: nn.Module) -> Iterator[None]:
    """The low-rank layers switched off inside, and as they were afterwards; no `requires_grad` changes.

    This is the model before training only where `adapter_is_identity(model)`: rows of the embeddings that are trained
    stay as they are.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True  # peft's own switch also freezes the adapter, or thaws a frozen one
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer._disable_adapters = value
