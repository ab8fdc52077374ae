"""Gradients for the parity check: small enough for every start, telling enough to find a wrong backward.

In: a model, trees, and a way to their log-probs. Out: a few gradients that any right way must agree on.
Must not know: tolerances, how log-probs are computed, files.

They are taken by the embeddings of every token, through which the backward of every layer's attention flows, and by a
few trained matrices, on trees cut short.

Shapes: T tokens of the trees laid flat, L tokens of prompt + branch, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tunesmith.data.types import Branch, Tree
from tunesmith.engine.logprobs import Logprobs
from tunesmith.model.added_tokens import trained_rows

NUM_TREES, NUM_BRANCHES, NUM_TOKENS = 2, 3, 32
"""At most two trees of three branches, every prompt and branch cut to 32 tokens: 256 tokens, whatever the rows are."""
NUM_FIRST, NUM_LAST = 8, 2
"""Trained matrices whose gradient is taken. The first are the first layer's queries, keys, values and output, both
factors of each with LoRA: a backward without the keys' part shows fully in the keys' own matrix, and as a tenth of
the embeddings' gradient only."""
LARGEST_MATRIX = 2**24
"""Elements of a matrix whose gradient is taken: 64 MiB in float32, more than any adapter's."""


def cut_short(trees: Sequence[Tree]) -> list[Tree]:
    """The tree with the most branches and the first other one, cut to a few tokens, all of them trained."""
    most = max(range(len(trees)), key=lambda number: len(trees[number].branches))
    others = [number for number in range(len(trees)) if number != most]
    cut: list[Tree] = []
    for number in (*others[: NUM_TREES - 1], most):
        tree = trees[number]
        parts = [branch.ids[:NUM_TOKENS] for branch in tree.branches[:NUM_BRANCHES]]
        branches = tuple(Branch(ids, np.ones(len(ids), dtype=np.bool_)) for ids in parts)
        cut.append(replace(tree, prompt_ids=tree.prompt_ids[:NUM_TOKENS], branches=branches))
    return cut


def _matrices(model: PreTrainedModel) -> list[nn.Parameter]:
    """The first and the last of the trained matrices.

    No vectors: the gradient of a key's bias is zero but for rounding. Not the embeddings, which are cut off.
    """
    embeddings = model.get_input_embeddings()
    embedded = {id(parameter) for parameter in embeddings.parameters()} if trained_rows(embeddings)[1] is None else ()
    trained = [
        parameter
        for parameter in model.parameters()
        if parameter.requires_grad
        and parameter.ndim > 1
        and parameter.numel() <= LARGEST_MATRIX
        and id(parameter) not in embedded
    ]
    return trained[:NUM_FIRST] + trained[NUM_FIRST:][-NUM_LAST:]


def _by_part(trees: Sequence[Tree], grads: Sequence[Tensor]) -> list[Tensor]:
    """Gradients by embeddings, of all prompts' tokens and of all branches', from [1, T, H] or from [1, L, H] a branch.

    Apart, because a prompt's gradient that lacks a branch is small beside the branches' own.
    """
    prompts, answers = [], []
    rows = [(tree, branch) for tree in trees for branch in tree.branches]
    if len(grads) == 1 and len(rows) > 1:
        flat_TH, start = grads[0][0], 0
        for tree in trees:
            sizes = [len(tree.prompt_ids), *(len(branch.ids) for branch in tree.branches)]
            prompt_PH, *parts = flat_TH[start : start + sum(sizes)].split(sizes)
            prompts.append(prompt_PH)
            answers.extend(parts)
            start += sum(sizes)
        return [torch.cat(prompts), torch.cat(answers)]
    for (tree, branch), grad in zip(rows, grads, strict=True):
        prompt_PH, answer_LH = grad[0].split([len(tree.prompt_ids), len(branch.ids)])
        answers.append(answer_LH)
        if branch is tree.branches[0]:
            prompts.append(prompt_PH.clone())
        else:
            prompts[-1] += prompt_PH
    return [torch.cat(prompts), torch.cat(answers)]


def gradients(
    model: PreTrainedModel, trees: Sequence[Tree], logprobs: Callable[[Sequence[Tree]], Logprobs]
) -> list[Tensor]:
    """Gradients of a weighted sum of the log-probs of `trees`, cut short: by prompts', by branches' embeddings, and by
    a few matrices; float32. The weights differ from token to token, as a loss's do.
    """
    short = cut_short(trees)
    embeddings = model.get_input_embeddings()
    leaves: list[Tensor] = []

    def cut_off(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        leaves.append(output.detach().float().requires_grad_())
        return leaves[-1].to(output.dtype)

    # Trained rows of the embeddings are mixed in outside the module, and are a matrix of their own in the list below.
    hook = embeddings.register_forward_hook(cut_off) if trained_rows(embeddings)[1] is None else None
    matrices = _matrices(model)
    try:
        with torch.enable_grad():
            logprob_N = logprobs(short).logprob_N
            total = (logprob_N * torch.linspace(-1, 2, len(logprob_N), device=logprob_N.device)).sum()
            found = torch.autograd.grad(total, [*leaves, *matrices], allow_unused=True)
    finally:
        if hook is not None:
            hook.remove()
    grads = [
        torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip([*leaves, *matrices], found, strict=True)
    ]
    parts = _by_part(short, [grad.float() for grad in grads[: len(leaves)]]) if leaves else []
    return [*parts, *(grad.float() for grad in grads[len(leaves) :])]


def farthest(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """The largest distance between two gradients, over the length of the wanted one."""
    worst = 0.0
    for mine, reference in zip(got, want, strict=True):
        length, distance = float(reference.norm()), float((mine - reference).norm())
        if distance:
            worst = max(worst, distance / length if length else float("inf"))
        if not np.isfinite(distance):
            return float("inf")
    return worst
