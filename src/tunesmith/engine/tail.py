"""The last layer, computed only where a loss reads it.

In: a transformers model. Out: the same model, whose last layer skips work that nothing reads. Behind the last layer
only the hidden states before trained tokens matter, so its queries, output projection and feed-forward run on those;
keys and values run on all tokens, since the read ones attend to them. The skipped outputs are zero.
Must not know: objectives, trees, files. The parity check judges the result like everything else.

It is done with hooks on parts of the layer, for any layer that is built of `self_attn` and `mlp`, so that no model code
is touched. They lie inside of what gradient checkpointing runs twice, so that recomputed activations go the same way.
Without a layout that names the read tokens, in generation for instance, they do nothing.

Shapes: T tokens of the forest, R of them read, F features.
"""

from __future__ import annotations

from collections.abc import Mapping
from weakref import WeakSet

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from tunesmith.engine.layout import ForestLayout

_POINTWISE = ("q_proj", "o_proj", "dense")
"""Parts of the attention that work on each token alone, and whose output only the token itself needs."""

_done: WeakSet[nn.Module] = WeakSet()


class _Reading:
    """Which tokens the layer is to compute; None: all of them. Its attention, which comes first, is told."""

    def __init__(self) -> None:
        self.rows_R: Tensor | None = None
        self.num_tokens = 0

    def begin(self, attention: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]) -> None:
        """The layer starts, perhaps for the second time (recomputed in the backward)."""
        layout = kwargs.get("forest_layout")
        self.rows_R = layout.read_R if isinstance(layout, ForestLayout) else None

    def take(self, part: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """[1, R, F] of a part's input [1, T, F]."""
        if self.rows_R is None:
            return None
        self.num_tokens = args[0].shape[1]
        return (args[0].index_select(1, self.rows_R), *args[1:])

    def put_back(
        self, part: nn.Module, args: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]
    ) -> Tensor | tuple[Tensor, ...] | None:
        """[1, T, F] from a part's output [1, R, F], which in some mixtures of experts has the router's beside it."""
        if self.rows_R is None:
            return None
        few, *others = output if isinstance(output, tuple) else (output,)
        whole = few.new_zeros(1, self.num_tokens, few.shape[-1]).index_copy_(1, self.rows_R, few)
        return (whole, *others) if isinstance(output, tuple) else whole


def skip_unread(model: PreTrainedModel) -> bool:
    """Install the hooks, once a model; whether its last layer is one that they fit."""
    layers = [module for module in model.base_model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        return False
    layer = layers[-1]
    children = dict(layer.named_children())
    if "self_attn" not in children or "mlp" not in children:
        return False
    if layer in _done:
        return True
    reading = _Reading()
    children["self_attn"].register_forward_pre_hook(reading.begin, with_kwargs=True)
    pointwise = [part for name, part in children["self_attn"].named_children() if name in _POINTWISE]
    for part in (*pointwise, children["mlp"]):
        part.register_forward_pre_hook(reading.take)
        part.register_forward_hook(reading.put_back)
    _done.add(layer)
    return True
