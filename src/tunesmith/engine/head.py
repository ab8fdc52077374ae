"""The LM head: which layer it is, what the model does to its output, and its logits, all of them or some columns.

In: a Hugging Face causal model, hidden states. Out: float32 logits.
Must not know: objectives, targets, files.

Shapes: C hidden states, H hidden size, V vocabulary, v neighbouring columns of it, K rows of the head that are trained
while the others are frozen (tokens that were added to the vocabulary).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from tunesmith.model.added_tokens import Rows, trained_rows


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """The LM head and what becomes of its output: logits = softcap * tanh(scale * head(h) / softcap) / temperature.

    `rows` stand in for the rows of the head that have their ids.
    """

    module: nn.Module
    scale: float = 1.0
    softcap: float | None = None
    rows: Rows | None = None
    temperature: float = 1.0

    @classmethod
    def of(cls, model: PreTrainedModel, *, temperature: float = 1.0) -> Head:
        """The head of a Hugging Face causal model: Cohere multiplies, Granite divides, Gemma 2 soft-caps its logits."""
        config = model.config.get_text_config().to_dict()
        scale = float(config.get("logit_scale") or 1.0) / float(config.get("logits_scaling") or 1.0)
        module, rows = trained_rows(model.get_output_embeddings())
        return cls(module, scale, config.get("final_logit_softcapping"), rows, temperature)

    @property
    def weight_VH(self) -> Tensor:
        """The head's matrix."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def bias_V(self) -> Tensor | None:
        """The head's bias, where it has one."""
        return self.module.bias if isinstance(self.module, nn.Linear) else None

    @property
    def vocabulary(self) -> int:
        """V: rows of the head's weight."""
        return int(self.weight_VH.shape[0])

    @property
    def is_linear(self) -> bool:
        """True for a plain linear layer, whose columns can be computed apart: no adapter on it, not quantized."""
        return type(self.module) is nn.Linear

    def trainable(self) -> list[nn.Parameter]:
        """Parameters of the head that want a gradient: its own weight, an adapter's, single rows."""
        rows = [] if self.rows is None else [self.rows.weight_KH]
        return [parameter for parameter in (*self.module.parameters(), *rows) if parameter.requires_grad]

    def finished(self, raw_Cv: Tensor) -> Tensor:
        """Logits from the layer's output, in place: scaled, soft-capped, divided by the temperature."""
        if self.softcap is not None:
            raw_Cv = raw_Cv.mul_(self.scale / self.softcap).tanh_()
            return raw_Cv.mul_(self.softcap / self.temperature)
        factor = self.scale / self.temperature
        return raw_Cv if factor == 1.0 else raw_Cv.mul_(factor)

    def slope(self, logits_Cv: Tensor) -> Tensor | float:
        """Derivative of `finished` by the layer's output, at these logits; a number where it is the same everywhere."""
        factor = self.scale / self.temperature
        if self.softcap is None:
            return factor
        return (logits_Cv * (self.temperature / self.softcap)).square_().neg_().add_(1).mul_(factor)

    def logits(self, hidden_CH: Tensor) -> Tensor:
        """Float32 logits [C, V], through the layer as it is, under autograd."""
        logits_CV: Tensor = self.module(hidden_CH).float()
        if self.rows is not None:
            rows_CK = linear(hidden_CH, self.rows.weight_KH.to(hidden_CH.dtype))
            logits_CV = logits_CV.index_copy_(1, self.rows.ids_K, rows_CK.float())  # in place: chunks are large
        if self.softcap is not None:
            return self.softcap * torch.tanh(logits_CV * (self.scale / self.softcap)) / self.temperature
        return logits_CV * (self.scale / self.temperature)
