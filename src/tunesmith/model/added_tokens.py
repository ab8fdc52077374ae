"""Tokens that the chat template needs and the tokenizer lacks: given to tokenizer and model, and trained as rows.

In: a tokenizer and the recipe's choice of template; a model. Out: the tokens with their ids, a model with a row for
each of them, and what peft has to be told so that it trains those rows and nothing else of the embeddings.
Must not know: data, stages, where weights lie.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tunesmith.data.template import needed_tokens
from tunesmith.errors import ModelError


@dataclass(frozen=True, slots=True)
class AddedTokens:
    """Control tokens that the base's tokenizer was given, and their ids; empty where it holds all that it needs."""

    names: tuple[str, ...] = ()
    ids: tuple[int, ...] = ()

    @property
    def note(self) -> str:
        """What the run says; empty where nothing was added."""
        if not self.names:
            return ""
        return f"added tokens {', '.join(self.names)}: their embeddings are trained"


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Trained rows of a frozen layer of the embeddings' shape, [V, H]: they stand in for its rows of the same ids."""

    ids_K: Tensor
    weight_KH: nn.Parameter


def add_tokens(tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> AddedTokens:
    """Add what the recipe's template needs and the tokenizer lacks, as control tokens; their ids follow its own."""
    names = needed_tokens(chat_template, tokenizer)
    if not names:
        return AddedTokens()
    tokenizer.add_special_tokens({"additional_special_tokens": list(names)}, replace_extra_special_tokens=False)
    ids = tokenizer.convert_tokens_to_ids(list(names))
    assert isinstance(ids, list)
    return AddedTokens(names, tuple(ids))


def make_room(model: PreTrainedModel, num_tokens: int, added: AddedTokens) -> None:
    """Give each added token a row of the embeddings and of the head; everything else stays as it is.

    Spare rows, which many models have behind their vocabulary, are used first: only a model without them grows, to
    `num_tokens`. The rows start at the mean of the others, so that the new tokens' logits start at the mean logit:
    neither likely nor unreachable (Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models").
    Differs: without the noise of transformers' own resize, so that a run does not depend on a draw.
    """
    if not added.ids:
        return
    embeddings = model.get_input_embeddings()
    num_rows = _matrix(embeddings).shape[0]
    first = min(*added.ids, num_rows)
    if max(added.ids) >= num_rows:
        with torch.random.fork_rng():  # transformers draws the new rows, which are overwritten below
            model.resize_token_embeddings(num_tokens, mean_resizing=False)
        embeddings = model.get_input_embeddings()
    new = sorted({*added.ids, *range(num_rows, _matrix(embeddings).shape[0])})
    head = model.get_output_embeddings()
    with torch.no_grad():
        for layer in (embeddings,) if head is None or _tied(embeddings, head) else (embeddings, head):
            weight_VH = _matrix(layer)
            weight_VH[new] = weight_VH[:first].mean(0, dtype=torch.float32).to(weight_VH.dtype)
        if isinstance(head, nn.Linear) and head.bias is not None:
            head.bias[new] = head.bias[:first].mean()


def indices_for_peft(
    model: PreTrainedModel, added: AddedTokens, target_modules: str | list[str]
) -> list[int] | dict[str, list[int]] | None:
    """peft's `trainable_token_indices`: a list where the head is tied (peft trains one set of rows for both), else
    the same ids for both layers by name.

    Raises ModelError where peft would change the model: it drops the bias of a head whose rows it trains, and cannot
    put a low-rank adapter on the same layer.
    """
    if not added.ids:
        return None
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = [name for name, module in model.named_modules() if module is embeddings or module is head]
    if isinstance(head, nn.Linear) and head.bias is not None:
        raise _cannot_train(added, "this model's head has a bias, which peft's trained rows leave out")
    targets = [target_modules] if isinstance(target_modules, str) else target_modules
    both = [target for target in targets if any(name == target or name.endswith(f".{target}") for name in names)]
    if both:
        raise _cannot_train(added, f"{both[0]} is in tuning.target_modules, and one layer cannot have both")
    ids = list(added.ids)
    return ids if head is None or _tied(embeddings, head) else dict.fromkeys(names, ids)  # None: a reward model


def trained_rows(layer: nn.Module) -> tuple[nn.Module, Rows | None]:
    """A layer without peft's wrapper, and the rows that are trained in it; None where there are none, or folded in."""
    if isinstance(layer, ModulesToSaveWrapper):  # trained whole: the copy is the layer
        return layer.modules_to_save[layer.active_adapters[0]], None
    if not isinstance(layer, TrainableTokensWrapper):
        return layer, None
    inside = layer.token_adapter
    base = inside.get_base_layer()
    if inside.merged:
        return base, None
    (name,) = inside.active_adapters
    weight_KH = inside.trainable_tokens_delta[name]
    return base, Rows(torch.tensor(inside.token_indices[name], device=weight_KH.device), weight_KH)


def embedded(layer: nn.Module, ids_T: Tensor) -> Tensor | None:
    """Embeddings of tokens, [T, H], in which only the trained rows want a gradient; None where none is trained.

    peft's own forward gives the same, but copies the matrix, and its backward makes a gradient of the matrix's size.
    """
    base, rows = trained_rows(layer)
    if rows is None:
        return None
    assert isinstance(layer, TrainableTokensWrapper)
    hidden_TH: Tensor = base(ids_T)
    is_row_TK = ids_T[:, None] == rows.ids_K
    rows_TH = is_row_TK.to(hidden_TH.dtype) @ rows.weight_KH.to(hidden_TH.dtype)
    scale = layer.token_adapter._get_embed_scale()  # Gemma 3 scales its embeddings in the layer
    if scale is not None:
        rows_TH = rows_TH * scale.to(rows_TH.dtype)
    return torch.where(is_row_TK.any(-1, keepdim=True), rows_TH, hidden_TH)


def fold_rows(model: nn.Module) -> None:
    """Write trained rows into the layers that they belong to, for reading: peft's own forward copies the whole matrix
    for each token that is generated."""
    for module in model.modules():
        if isinstance(module, TrainableTokensWrapper):
            module.token_adapter.merge()


def _matrix(layer: object) -> Tensor:
    if isinstance(layer, nn.Embedding | nn.Linear):
        return layer.weight
    raise ModelError(
        f"tokens cannot be added to this model: its embeddings or head are a {type(layer).__name__}",
        where="model.chat_template",
        remedy="Use `chat_template: plain`, which needs no new tokens.",
    )


def _tied(embeddings: object, head: object) -> bool:
    return _matrix(embeddings) is _matrix(head)


def _cannot_train(added: AddedTokens, reason: str) -> ModelError:
    return ModelError(
        f"the added tokens {', '.join(added.names)} cannot be trained beside an adapter: {reason}",
        where="model.chat_template",
        remedy="Use `chat_template: plain`, or `tuning: {kind: full}`.",
    )
