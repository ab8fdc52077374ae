"""The objectives and a Llama once more, from the papers, in float64: slow, plain, one sequence at a time.

In: weights by their names, trees of token ids. Out: the step's loss, through which autograd gives the gradient.
Must not know: forests, attention backends, chunks, objectives, transformers' code: nothing that it judges.

Llama: Touvron et al. 2023, arXiv:2302.13971; RMSNorm: Zhang and Sennrich 2019, arXiv:1910.07467; rotary positions:
Su et al. 2021, arXiv:2104.09864 (halves of a head as pairs, as in the published weights); SwiGLU: Shazeer 2020,
arXiv:2002.05202; grouped heads: Ainslie et al. 2023, arXiv:2305.13245. DPO: Rafailov et al. 2023, arXiv:2305.18290,
equation 7; label smoothing: Mitchell 2023, "A note on DPO with noisy preferences", equation 3.

Shapes: L tokens of a row, H hidden, D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from tunesmith.data.types import Tree
from tunesmith.selftest.inputs import HEAD_SIZE, HEADS, KEY_HEADS, LAYERS, NORM_EPS, THETA

Weights = Mapping[str, Tensor]


def float64_weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the model's weights on the CPU, in float64, that want a gradient."""
    return {name: weight.detach().cpu().double().requires_grad_() for name, weight in model.named_parameters()}


def _norm(x_LH: Tensor, weight_H: Tensor) -> Tensor:
    return x_LH / torch.sqrt((x_LH * x_LH).mean(-1, keepdim=True) + NORM_EPS) * weight_H


def _turned(x_LD: Tensor) -> Tensor:
    """Rotary positions: feature i and i + D/2 are a pair, turned by position / theta^(2i/D)."""
    half = HEAD_SIZE // 2
    speed = THETA ** (-2 * torch.arange(half, dtype=torch.float64) / HEAD_SIZE)
    angle = torch.arange(len(x_LD), dtype=torch.float64)[:, None] * speed
    first, second = x_LD[:, :half], x_LD[:, half:]
    return torch.cat((first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()), -1)


def _attention(weights: Weights, layer: str, x_LH: Tensor) -> Tensor:
    query, key, value = (x_LH @ weights[f"{layer}.self_attn.{name}_proj.weight"].T for name in "qkv")
    hidden_LL = torch.ones(len(x_LH), len(x_LH), dtype=torch.bool).triu(1)
    heads = []
    for head in range(HEADS):
        own = slice(head * HEAD_SIZE, (head + 1) * HEAD_SIZE)
        group = head // (HEADS // KEY_HEADS)
        shared = slice(group * HEAD_SIZE, (group + 1) * HEAD_SIZE)
        scores_LL = _turned(query[:, own]) @ _turned(key[:, shared]).T / HEAD_SIZE**0.5
        heads.append(scores_LL.masked_fill(hidden_LL, float("-inf")).softmax(-1) @ value[:, shared])
    return torch.cat(heads, -1) @ weights[f"{layer}.self_attn.o_proj.weight"].T


def llama_logits(weights: Weights, ids_L: Tensor) -> Tensor:
    """Logits after every token of one sequence, [L, V]."""
    x_LH = weights["model.embed_tokens.weight"][ids_L]
    for number in range(LAYERS):
        layer = f"model.layers.{number}"
        x_LH = x_LH + _attention(weights, layer, _norm(x_LH, weights[f"{layer}.input_layernorm.weight"]))
        normed_LH = _norm(x_LH, weights[f"{layer}.post_attention_layernorm.weight"])
        gate, up, down = (weights[f"{layer}.mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        gated = normed_LH @ gate.T
        x_LH = x_LH + (gated * torch.sigmoid(gated) * (normed_LH @ up.T)) @ down.T
    return _norm(x_LH, weights["model.norm.weight"]) @ weights["lm_head.weight"].T


def branch_logprobs(weights: Weights, tree: Tree) -> list[Tensor]:
    """For each branch the log-probs of its trained tokens that have a token before them."""
    found = []
    for branch in tree.branches:
        ids_L = torch.from_numpy(np.concatenate([tree.prompt_ids, branch.ids]).astype(np.int64))
        logprobs_LV = torch.log_softmax(llama_logits(weights, ids_L), -1)
        start = len(tree.prompt_ids)
        places = [start + place for place in range(len(branch.ids)) if branch.trained[place] and start + place > 0]
        found.append(torch.stack([logprobs_LV[place - 1, ids_L[place]] for place in places]))
    return found


def nll(weights: Weights, trees: Sequence[Tree]) -> Tensor:
    """-log p, mean over all trained tokens of the step."""
    values = torch.cat([logprobs for tree in trees for logprobs in branch_logprobs(weights, tree)])
    return -values.sum() / len(values)


def dpo(
    weights: Weights, trees: Sequence[Tree], references: Sequence[np.ndarray], beta: float, smoothing: float
) -> Tensor:
    """Mean over the step's pairs. `references` holds a tree's log-probs, the chosen answer's first."""
    losses = []
    for tree, reference in zip(trees, references, strict=True):
        chosen, rejected = branch_logprobs(weights, tree)
        reference_chosen = float(reference[: len(chosen)].astype(np.float64).sum())
        reference_rejected = float(reference[len(chosen) :].astype(np.float64).sum())
        margin = (chosen.sum() - reference_chosen) - (rejected.sum() - reference_rejected)
        win, lose = torch.sigmoid(beta * margin), torch.sigmoid(-beta * margin)
        losses.append(-(1 - smoothing) * torch.log(win) - smoothing * torch.log(lose))
    return torch.stack(losses).mean()
