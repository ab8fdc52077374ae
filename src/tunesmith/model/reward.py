"""Reward models: a base with a scalar head in place of its LM head, as transformers' sequence classifiers have it.

In: what the recipe says of the model. Out: a classifier with one label, its head from the folder or drawn anew; what
plain transformers needs to read its scores where we do. Must not know: adapters, data, stages.

A head that is lost is an error, never a fresh random one: only the start of a training draws a head, and says from
which seed. The head is kept and computed in float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from tunesmith.errors import ModelError

HEAD = "score"
"""Name of the head in transformers' decoders with a classifier."""
TASK = "SEQ_CLS"
"""peft's word for adapters that carry such a head."""


def score_layer(model: nn.Module) -> nn.Module | None:
    """The head of a reward model, or peft's wrapper around it; None for a language model."""
    return dict(model.named_children()).get(HEAD)


def is_classifier(config: PreTrainedConfig) -> bool:
    """Whether a folder's configuration is that of a saved reward model (or another classifier)."""
    return any(str(name).endswith("ForSequenceClassification") for name in config.architectures or ())


def is_reward_adapter(settings: Mapping[str, object]) -> bool:
    """Whether an adapter's settings say that its file holds a head."""
    return str(settings.get("task_type")).rsplit(".", 1)[-1] == TASK


def refuse_classifier(config: PreTrainedConfig, where: str) -> None:
    """ModelError where a policy is wanted and the folder holds a reward model."""
    if is_classifier(config):
        raise ModelError("is a reward model: it scores answers and writes none", where=where, remedy=_REMEDY)


def refuse_reward_adapter(settings: Mapping[str, object], where: str) -> None:
    """ModelError where a policy's adapter is wanted and this one is a reward model's."""
    if is_reward_adapter(settings):
        raise ModelError("is a reward model's adapter: it scores answers and writes none", where=where, remedy=_REMEDY)


_REMEDY = "Start from the SFT stage or the base; a reward model is for `tunesmith score`."


def refuse_headless(settings: Mapping[str, object], where: str) -> None:
    """ModelError where a reward model's adapter is wanted and this one has no head."""
    if not is_reward_adapter(settings):
        remedy = "Name a stage with `method: reward`, or train one."
        raise ModelError("is no reward model's adapter: it has no head", where=where, remedy=remedy)


def without_head(names: Sequence[str], config: PreTrainedConfig, *, may_draw: bool) -> list[str]:
    """Tensors that a folder lacks for a reward model, but for the head of a language model's, which is to be drawn."""
    if is_classifier(config) or not may_draw:
        return list(names)
    return [name for name in names if not name.startswith(f"{HEAD}.")]


def finish_head(model: PreTrainedModel, config: PreTrainedConfig, *, seed: int | None, where: str) -> None:
    """Put the head into float32, and draw it from `seed` where the folder is a language model's.

    N(0, 1 / (H + 1)), so that scores start at about 1 whatever the hidden size H is (Stiennon et al. 2020,
    arXiv:2009.01325). Raises ModelError where the model's head is not one linear layer with one label.
    """
    layer = score_layer(model)
    if not isinstance(layer, nn.Linear) or layer.out_features != 1:
        found = "none" if layer is None else f"a {type(layer).__name__}"
        found = f"{layer.out_features} labels" if isinstance(layer, nn.Linear) else found
        remedy = "Use a decoder that transformers has a sequence classifier of; it must have one label."
        raise ModelError(f"cannot be a reward model: its head is {found}", where=where, remedy=remedy)
    layer.float()
    if seed is None or is_classifier(config):
        return
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(layer.weight.shape, generator=generator) / math.sqrt(layer.in_features + 1)
    with torch.no_grad():
        layer.weight.copy_(drawn)
        if layer.bias is not None:
            layer.bias.zero_()


def choose_pad(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]) -> None:
    """Name a padding token that never ends an answer, in the model's configuration and in the tokenizer's.

    transformers reads a score at the last token that is not padding. Where padding is the token that ends answers, as
    many tokenizers have it, that is the token before the last one (TRAPS 53).
    """
    controls = [token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special]
    special = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, *controls)
    config = model.config.get_text_config()
    fitting = [each for each in special if isinstance(each, int) and each not in (*stop_ids, tokenizer.eos_token_id)]
    config.pad_token_id = fitting[0] if fitting else None  # without one, transformers takes single rows only
    model.config.pad_token_id = config.pad_token_id
    if fitting:
        tokenizer.pad_token = str(tokenizer.convert_ids_to_tokens(fitting[0]))
