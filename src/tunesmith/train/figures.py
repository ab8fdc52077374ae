"""What the rows say of themselves, beside the log-probs of their tokens: weights, scores, labels.

In: log-probs of trees, and the trees. Out: the log-probs as an objective reads them. Must not know: objectives, steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tunesmith.data.types import Tree
from tunesmith.engine.logprobs import Logprobs

Array = npt.NDArray[np.float32]


def with_figures(logprobs: Logprobs, trees: Sequence[Tree]) -> Logprobs:
    """The log-probs with what the rows say of themselves: weights of tokens, scores, labels, weights of examples."""
    like = logprobs.logprob_N.detach()

    def tensor(values: Sequence[float] | Array) -> Tensor:
        return torch.tensor(np.asarray(values, np.float64)).to(like)

    branches = [branch for tree in trees for branch in tree.branches]
    weight_N = score_B = label_G = None
    if any(branch.weights is not None for branch in branches):
        weight_N = tensor(np.concatenate([read_weights(tree) for tree in trees]))
    if trees and all(tree.scores for tree in trees):
        score_B = tensor([score for tree in trees for score in tree.scores])
    if any(tree.label is not None for tree in trees):
        label_G = tensor([math.nan if tree.label is None else float(tree.label) for tree in trees])
    weight_G = tensor([tree.weight for tree in trees]) if any(tree.weight != 1 for tree in trees) else None
    return replace(logprobs, weight_N=weight_N, score_B=score_B, label_G=label_G, weight_G=weight_G)


def read_weights(tree: Tree) -> Array:
    """How much each token counts that the engine returns a log-prob of, branch by branch."""
    unread = 1 if len(tree.prompt_ids) == 0 else 0
    parts = []
    for branch in tree.branches:
        weights = branch.trained.astype(np.float32) if branch.weights is None else branch.weights
        parts.append(weights[unread:][branch.trained[unread:]])
    return np.concatenate(parts)
