"""A model made ready for generation, and put back exactly as it was, exceptions included.

In: a causal model, with or without an adapter. Out: the model in eval mode, under ordinary attention, with no
generation settings of its own. Must not know: prompts, tokenizers, stages.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel

from tunesmith.engine.attention import ordinary_attention

CausalModel = PreTrainedModel | PeftModel


def bare(model: CausalModel) -> PreTrainedModel:
    """The transformers model inside. An adapter's layers sit in its modules, so it generates with them."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(inner, PreTrainedModel)
    return inner


@contextmanager
def generation_mode(model: CausalModel) -> Iterator[PreTrainedModel]:
    """The model inside, ready for `generate`; every module's mode and every setting is restored at the end.

    A model may bring settings of its own for generation (a repetition penalty, top-k). They are set aside: a figure
    has to measure the model, and every stage in the same way.
    """
    inner = bare(model)
    modes = [(module, module.training) for module in model.modules()]
    settings = inner.generation_config
    with ordinary_attention(inner):
        try:
            model.eval()
            inner.generation_config = GenerationConfig()
            yield inner
        finally:
            for module, training in modes:
                module.training = training
            inner.generation_config = settings
