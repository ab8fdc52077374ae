"""The engine: trees in, log-probs out, under any Hugging Face causal model.

In: a transformers model (LoRA layers may be injected) and trees. Out: log-probs of the trained tokens; of a reward
model their scores.
Must not know: objectives, optimizers, files, recipes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tunesmith.data.types import Tree
from tunesmith.engine.attention import use_forest_attention
from tunesmith.engine.extras import token_extras
from tunesmith.engine.forest import Forest, build_forest
from tunesmith.engine.head import Head
from tunesmith.engine.layout import ForestLayout, Kernel
from tunesmith.engine.logprobs import Extra, Logprobs, token_logprobs
from tunesmith.engine.plain import plain_logprobs
from tunesmith.engine.score_head import ScoreHead
from tunesmith.engine.tail import skip_unread
from tunesmith.model.added_tokens import embedded

Backend = Kernel | Literal["plain"]

_WORTH_SKIPPING = 0.9  # of the tokens read: above, the copies cost what is saved
VERSION = 1
"""Part of the reference cache's key: raise it when a change moves log-probs by more than rounding."""


@dataclass(frozen=True, slots=True, eq=False)
class Engine:
    """A model and the way its trees are computed.

    backend `sdpa`, `varlen`, `flex`: forests through the forest attention, which runs on that kernel. `plain`: one
    branch at a time through the model's own attention, for models that the parity check refuses. But for `plain` the
    model stays switched to the forest attention between calls; wrap generation in `ordinary_attention`.
    skip: the last layer is computed only for the tokens that a loss reads. autocast: the type of the products.
    noise: what is put on a forest's embeddings, [T, H], before the first layer.
    """

    model: PreTrainedModel
    backend: Backend = "sdpa"
    chunk_bytes: int | None = None
    skip: bool = True
    autocast: torch.dtype | None = None
    noise: Callable[[Tensor, Sequence[Tree]], Tensor] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """What the forward pass computes in."""
        return self.autocast or self.model.dtype

    def logprobs(self, trees: Sequence[Tree], wants: Sequence[Extra] = ()) -> Logprobs:
        """Log-probs of every trained token of `trees` as one micro-batch, in tree, branch and token order.

        `wants` names what else of the tokens' distributions is to be supplied.
        Keeps the autograd graph unless gradients are switched off. Modes (train, eval) are the caller's. Log-probs
        are float32 also under `autocast`, which holds here so that training, evaluation and reference agree.
        """
        if self.autocast is None:
            return self._logprobs(trees, wants)
        with torch.autocast(self.model.device.type, dtype=self.autocast):
            return self._logprobs(trees, wants)

    def _read(self, forest: Forest) -> Tensor | None:
        """The tokens whose last hidden state is read, where leaving the others out pays."""
        few = len(forest.read_R) <= _WORTH_SKIPPING * forest.num_tokens
        return forest.read_R if self.skip and few and skip_unread(self.model) else None

    def _logprobs(self, trees: Sequence[Tree], wants: Sequence[Extra]) -> Logprobs:
        if self.backend == "plain":
            return plain_logprobs(self.model, trees, wants, noise=self.noise)
        use_forest_attention(self.model)
        score_head = ScoreHead.of(self.model)
        forest = build_forest(trees, self.model.device, reads_own=score_head is not None)
        embeddings = self.model.get_input_embeddings()
        embedded_TH = embedded(embeddings, forest.input_ids_T)
        if self.noise is not None:
            embedded_TH = self.noise(embeddings(forest.input_ids_T) if embedded_TH is None else embedded_TH, trees)
        hidden = self.model.base_model(
            input_ids=forest.input_ids_T[None] if embedded_TH is None else None,
            inputs_embeds=None if embedded_TH is None else embedded_TH[None],
            position_ids=forest.positions_T[None],
            attention_mask=None,
            use_cache=False,
            forest_layout=ForestLayout(forest.spans, self.backend, self._read(forest)),
        ).last_hidden_state
        source_NH = hidden[0].index_select(0, forest.source_N)
        if score_head is not None:
            return Logprobs(score_head.scores(source_NH), forest.branch_N, forest.tree_B)
        head = Head.of(self.model)
        logprob_N = token_logprobs(source_NH, forest.target_N, head, chunk_bytes=self.chunk_bytes)
        extras = token_extras(source_NH, forest.target_N, logprob_N, head, wants)
        return Logprobs(logprob_N, forest.branch_N, forest.tree_B, extras=extras)


def tree_logprobs(model: PreTrainedModel, trees: Sequence[Tree]) -> Logprobs:
    """Log-probs of trees under a Hugging Face causal model: `Engine(model).logprobs(trees)` for notebooks."""
    return Engine(model).logprobs(trees)
