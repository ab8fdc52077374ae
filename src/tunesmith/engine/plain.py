"""The slow way: one branch at a time through the model's own forward, attention and head.

In: a Hugging Face causal model and trees. Out: the same log-probs as the engine's, with gradient.
It is the engine's judge in the parity check, and its stand-in for models that mix along the flat sequence
(state-space, convolutional). Must not know: forests' layout, chunks, objectives.

Shapes: L tokens of prompt + branch, V vocabulary, N trained tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tunesmith.data.types import Branch, Tree
from tunesmith.engine.attention import ordinary_attention
from tunesmith.engine.logprobs import Logprobs


def _branch_logprobs(model: PreTrainedModel, prompt_ids: np.ndarray, branch: Branch) -> Tensor:
    """Log-probs of the branch's trained tokens, float32; an empty prompt leaves its first token out."""
    ids_L = torch.from_numpy(np.concatenate((prompt_ids, branch.ids)).astype(np.int64)).to(model.device)
    trained_L = torch.zeros(len(ids_L), dtype=torch.bool, device=model.device)
    trained_L[len(prompt_ids) :] = torch.from_numpy(branch.trained).to(model.device)
    logits_LV: Tensor = model(input_ids=ids_L[None], use_cache=False).logits[0].float()
    logprob_L = logits_LV[:-1].log_softmax(-1).gather(-1, ids_L[1:, None]).squeeze(-1)
    return logprob_L[trained_L[1:]]


def plain_logprobs(model: PreTrainedModel, trees: Sequence[Tree]) -> Logprobs:
    """Log-probs of every trained token of `trees`, tree by tree and branch by branch."""
    parts: list[Tensor] = []
    tree_of_branch: list[int] = []
    with ordinary_attention(model):
        for tree_number, tree in enumerate(trees):
            for branch in tree.branches:
                parts.append(_branch_logprobs(model, tree.prompt_ids, branch))
                tree_of_branch.append(tree_number)
    lengths_B = torch.tensor([len(part) for part in parts], device=model.device)
    branch_N = torch.repeat_interleave(torch.arange(len(parts), device=model.device), lengths_B)
    return Logprobs(torch.cat(parts), branch_N, torch.tensor(tree_of_branch, device=model.device))
