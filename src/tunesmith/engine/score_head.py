"""The head of a reward model: one number from a token's last hidden state.

In: a sequence classifier of transformers with one label, hidden states. Out: float32 scores, with gradient.
Must not know: trees, where in an answer a score is read, objectives, files.

Shapes: N tokens that are read, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tunesmith.model.reward import score_layer


@dataclass(frozen=True, slots=True, eq=False)
class ScoreHead:
    """The head as the model holds it: a linear layer, or peft's wrapper around the trained copy of it."""

    layer: nn.Module

    @classmethod
    def of(cls, model: PreTrainedModel) -> ScoreHead | None:
        """The head of a reward model; None for a language model."""
        layer = score_layer(model)
        return None if layer is None else cls(layer)

    def scores(self, hidden_NH: Tensor) -> Tensor:
        """One score a token, [N]; in the head's own type, float32, whatever the layers before it compute in."""
        dtype = next(self.layer.parameters()).dtype
        with torch.autocast(hidden_NH.device.type, enabled=False):
            score_N1: Tensor = self.layer(hidden_NH.to(dtype))
        return score_N1.squeeze(-1)
