"""Losses of a step written from the papers, in float64, one branch at a time, by plain Hugging Face forwards.

Nothing here comes from the project but the shape of a tree.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tunesmith.data.types import Tree


def branch_logprobs(model: PreTrainedModel, tree: Tree) -> list[Tensor]:
    """For each branch the log-probs of its trained tokens; the model must be float64."""
    found = []
    for branch in tree.branches:
        ids = torch.from_numpy(np.concatenate([tree.prompt_ids, branch.ids]).astype(np.int64))
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        logprobs = torch.log_softmax(logits, -1)
        start = len(tree.prompt_ids)
        places = [start + place for place in range(len(branch.ids)) if branch.trained[place] and start + place > 0]
        found.append(torch.stack([logprobs[place - 1, ids[place]] for place in places]))
    return found


def slow_nll(model: PreTrainedModel, trees: Sequence[Tree]) -> Tensor:
    """Mean over all trained tokens of the step."""
    values = torch.cat([logprobs for tree in trees for logprobs in branch_logprobs(model, tree)])
    return -values.sum() / len(values)


def slow_dpo(
    model: PreTrainedModel,
    trees: Sequence[Tree],
    references: Sequence[np.ndarray],
    beta: float = 0.1,
    smoothing: float = 0.0,
) -> Tensor:
    """Rafailov et al. 2023, equation 7, with Mitchell's label smoothing; mean over the step's pairs."""
    losses = []
    for tree, reference in zip(trees, references, strict=True):
        chosen, rejected = branch_logprobs(model, tree)
        reference_chosen = float(reference[: len(chosen)].astype(np.float64).sum())
        reference_rejected = float(reference[len(chosen) :].astype(np.float64).sum())
        h = (chosen.sum() - rejected.sum()) - (reference_chosen - reference_rejected)
        win, lose = torch.sigmoid(beta * h), torch.sigmoid(-beta * h)
        losses.append(-(1 - smoothing) * torch.log(win) - smoothing * torch.log(lose))
    return torch.stack(losses).mean()


def slow_spread(model: PreTrainedModel, trees: Sequence[Tree]) -> Tensor:
    """The made-up coupled method of tests.support.training."""
    margins = []
    for tree in trees:
        chosen, rejected = branch_logprobs(model, tree)
        margins.append(chosen.sum() - rejected.sum())
    step = torch.stack(margins)
    return 0.01 * ((step - step.mean()) ** 2).mean()
