"""A policy: the model that a stage trains or a comparison asks, wherever its weights lie.

In: where full weights and an adapter lie, and which weights are to be trained. Out: the transformers model, its
tokenizer, and the peft wrapper where there is an adapter. Must not know: data, objectives, the loop.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tunesmith.errors import ModelError
from tunesmith.model.adapter_init import fill_loftq
from tunesmith.model.adapters import (
    adapter_settings,
    add_adapter,
    continue_adapter,
    inner_model,
    load_adapter,
    merged,
    save_adapter,
)
from tunesmith.model.added_tokens import AddedTokens
from tunesmith.model.chosen import choose_trained
from tunesmith.model.load import forward_dtype, load_extended_model, quiet_transformers
from tunesmith.model.reward import choose_pad, refuse_headless, score_layer
from tunesmith.recipe.models import Full, Lora, Model


@dataclass(frozen=True, slots=True)
class Weights:
    """Where weights lie: a model's, and those of an adapter on it."""

    full: Model
    adapter: Path | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Policy:
    """A loaded model; `adapted` is peft's view of the same weights where there is an adapter.

    `added` are the tokens that the base's tokenizer was given for the template; the model has a row for each.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    weights: Weights
    adapted: PeftModel | None = None
    added: AddedTokens = field(default_factory=AddedTokens)

    @property
    def kind(self) -> str:
        """What a stage's result is saved as: `adapter` or `model`."""
        return "model" if self.adapted is None else "adapter"


def policy_for_training(
    weights: Weights, tuning: Lora | Full, *, device: torch.device, seed: int, scores: bool = False
) -> Policy:
    """The policy at a stage's start, its trainable weights in float32 and everything else frozen.

    An adapter is trained on as it is (one adapter runs through all stages) or, before full fine-tuning, folded in.
    `scores`: a reward model instead, whose head is drawn from `seed` where the weights are a policy's.
    """
    if isinstance(tuning, Full):
        return _full(weights, tuning, device, scores=scores, seed=seed)
    dtype = forward_dtype(weights.full, device)
    model, tokenizer, added = load_extended_model(
        weights.full, device=device, dtype=dtype, scores=scores, head_seed=seed
    )
    if weights.adapter is None:
        adapted = add_adapter(model, tuning, seed=seed, added=added)
        if tuning.init == "loftq":
            fill_loftq(adapted, _unquantized(weights.full))
    else:
        adapted = continue_adapter(model, tuning, weights.adapter, seed=seed, added=added)
    return Policy(inner_model(adapted), tokenizer, weights, adapted, added)


def _full(weights: Weights, tuning: Full, device: torch.device, *, scores: bool, seed: int) -> Policy:
    if weights.full.quantization != "none":
        raise ModelError(
            f"{weights.full.quantization} weights are frozen and cannot be fully fine-tuned",
            where="tuning.kind",
            remedy="Use `tuning: {kind: lora}`, or `model.quantization: none`.",
        )
    model, tokenizer, added = load_extended_model(
        weights.full, device=device, dtype=torch.float32, scores=scores, head_seed=seed
    )
    if weights.adapter is not None:
        model = merged(load_adapter(model, weights.adapter))
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    choose_trained(model, train_only=tuning.train_only, freeze=tuning.freeze)
    return Policy(model, tokenizer, weights, added=added)


def _unquantized(model: Model) -> PreTrainedModel:
    """The weights before quantization, in the host's memory."""
    plain = model.model_copy(update={"quantization": "none"})
    host = torch.device("cpu")
    return load_extended_model(plain, device=host, dtype=forward_dtype(model, host))[0]


def policy_for_reading(weights: Weights, *, device: torch.device, scores: bool = False) -> Policy:
    """The policy as it is, frozen, in eval mode, for generation, scoring and merging.

    `scores`: a reward model instead, with the head that it was saved with. Raises ModelError where that is missing.
    """
    dtype = forward_dtype(weights.full, device)
    if scores and weights.adapter is not None:
        refuse_headless(adapter_settings(weights.adapter), str(weights.adapter))
    # the head that an adapter brings takes the place of the drawn one, and must be there
    head_seed = None if weights.adapter is None else 0
    model, tokenizer, added = load_extended_model(
        weights.full, device=device, dtype=dtype, scores=scores, head_seed=head_seed
    )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if weights.adapter is None:
        return Policy(model, tokenizer, weights, added=added)
    adapted = load_adapter(model, weights.adapter)
    return Policy(inner_model(adapted), tokenizer, weights, adapted, added)


def merged_model(policy: Policy) -> PreTrainedModel:
    """The policy with its adapter, if any, folded in.

    A quantized base is read again and dequantized first: the weights that it was trained with, not the original ones.
    """
    if policy.adapted is None:
        return policy.model
    if policy.weights.full.quantization == "none":
        return merged(policy.adapted)
    assert policy.weights.adapter is not None
    base, _, _ = load_extended_model(policy.weights.full, device=policy.model.device, dtype=policy.model.dtype)
    with quiet_transformers():
        base.dequantize(dtype=policy.model.dtype)
    return merged(load_adapter(base, policy.weights.adapter))


def set_stop_ids(model: PreTrainedModel, stop_ids: tuple[int, ...]) -> None:
    """Write the ids at which generation stops into the model's generation config (TRAPS 15)."""
    generation = model.generation_config
    assert generation is not None
    generation.eos_token_id = list(stop_ids) if len(stop_ids) > 1 else stop_ids[0]
    if generation.pad_token_id is None:
        generation.pad_token_id = stop_ids[0]


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, chat_template: str, folder: Path) -> None:
    """Write the tokenizer with the template that trained, so that whoever loads the result renders the same."""
    before = tokenizer.chat_template
    tokenizer.chat_template = chat_template
    try:
        tokenizer.save_pretrained(str(folder))
    finally:
        tokenizer.chat_template = before


def save_policy(policy: Policy, folder: Path, *, stop_ids: tuple[int, ...], chat_template: str) -> None:
    """Write what was trained, the tokenizer with its template, and the stop ids into `folder`.

    An adapter folder is plain peft, a model folder plain transformers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    answers = score_layer(policy.model) is None  # a reward model generates nothing
    if answers:
        set_stop_ids(policy.model, stop_ids)
    else:
        choose_pad(policy.model, policy.tokenizer, stop_ids)
    with quiet_transformers():
        if policy.adapted is None:
            policy.model.save_pretrained(str(folder), safe_serialization=True)
        else:
            save_adapter(policy.adapted, folder)
            if answers:
                assert policy.model.generation_config is not None
                policy.model.generation_config.save_pretrained(str(folder))
    save_tokenizer(policy.tokenizer, chat_template, folder)
