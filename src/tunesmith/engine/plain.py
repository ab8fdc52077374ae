"""The slow way: one branch at a time through the model's own forward, attention and head.

In: a Hugging Face causal model and trees. Out: the same log-probs as the engine's, with gradient.
It is the engine's judge in the parity check, and its stand-in for models that mix along the flat sequence
(state-space, convolutional). Must not know: forests' layout, chunks, objectives.

Shapes: L tokens of prompt + branch, V vocabulary, N trained tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tunesmith.data.types import Branch, Tree
from tunesmith.engine.attention import ordinary_attention
from tunesmith.engine.extras import of_logits
from tunesmith.engine.logprobs import Extra, Logprobs
from tunesmith.engine.score_head import ScoreHead

_CHUNK_NUMBERS = 64 * 2**20
"""Logits in float32 at a time: 256 MiB."""


def branch_logprobs(model: PreTrainedModel, prompt_ids: np.ndarray, branch: Branch) -> Tensor:
    """Log-probs of the branch's trained tokens, float32; an empty prompt leaves its first token out."""
    return _branch_values(model, prompt_ids, branch, ())[0]


def _branch_values(
    model: PreTrainedModel,
    prompt_ids: np.ndarray,
    branch: Branch,
    wants: Sequence[Extra],
    noise: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, dict[Extra, Tensor]]:
    """Log-probs, and the wanted extras; `noise` is put on the embeddings, [L, H]."""
    ids_L = torch.from_numpy(np.concatenate((prompt_ids, branch.ids)).astype(np.int64)).to(model.device)
    trained = np.flatnonzero(branch.trained) + len(prompt_ids)
    target_N = torch.from_numpy(trained[trained > 0]).to(model.device)
    score_head = ScoreHead.of(model)
    if score_head is not None:
        hidden_LH = model.base_model(input_ids=ids_L[None], use_cache=False).last_hidden_state[0]
        return score_head.scores(hidden_LH[target_N]), {}
    given = {"input_ids": ids_L[None]}
    if noise is not None:
        given = {"inputs_embeds": noise(model.get_input_embeddings()(ids_L))[None]}
    if _keeps_logits(type(model)):
        logits_NV = model(**given, use_cache=False, logits_to_keep=target_N - 1).logits[0]
    else:
        logits_NV = model(**given, use_cache=False).logits[0][target_N - 1]
    rows = max(1, _CHUNK_NUMBERS // logits_NV.shape[-1])
    parts = zip(logits_NV.split(rows), ids_L[target_N].split(rows), strict=True)
    found = [part.float().log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1) for part, ids in parts]
    return torch.cat(found), of_logits(logits_NV, wants)


def _keeps_logits(kind: type[PreTrainedModel]) -> bool:
    """Whether the model can leave out logits that nobody reads: with a large vocabulary they are gigabytes."""
    return "logits_to_keep" in inspect.signature(kind.forward).parameters


def plain_logprobs(
    model: PreTrainedModel,
    trees: Sequence[Tree],
    wants: Sequence[Extra] = (),
    *,
    noise: Callable[[Tensor, Sequence[Tree]], Tensor] | None = None,
) -> Logprobs:
    """Log-probs of every trained token of `trees`, tree by tree and branch by branch.

    `noise` is put on the embeddings of trees of one branch, [L, H].
    """
    branches = [(number, tree.prompt_ids, branch) for number, tree in enumerate(trees) for branch in tree.branches]
    assert noise is None or len(branches) == len(trees), "only supervised methods train with noise"

    def noise_of(tree: Tree) -> Callable[[Tensor], Tensor] | None:
        return None if noise is None else lambda embedded_LH: noise(embedded_LH, [tree])

    with ordinary_attention(model):
        found = [
            _branch_values(model, prompt_ids, branch, wants, noise_of(trees[number]))
            for number, prompt_ids, branch in branches
        ]
    parts = [logprob_N for logprob_N, _ in found]
    lengths_B = torch.tensor([len(part) for part in parts], device=model.device)
    branch_N = torch.repeat_interleave(torch.arange(len(parts), device=model.device), lengths_B)
    extras = {name: torch.cat([values[name] for _, values in found]) for name in wants}
    tree_B = torch.tensor([number for number, _, _ in branches], device=model.device)
    return Logprobs(torch.cat(parts), branch_N, tree_B, extras=extras)
