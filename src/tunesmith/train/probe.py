"""What an evaluation looks at besides the held-out loss: prompts to answer, rows of an earlier stage to remember.

In: held-out trees, an engine, how a stage ends its answers. Out: the record that the loop is given.
Must not know: tokenizers (it is handed a function), the loop, what a figure is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import psutil
from torch import Tensor
from transformers import PreTrainedModel

from tunesmith.data.types import Ids, Tree
from tunesmith.recipe.stages import Samples
from tunesmith.train.optim import Trainable

RETAINED_ROWS = 64
"""Rows of the earlier stage that are scored: enough for a loss to a hundredth of a nat, few enough to cost nothing."""
_ROOM = 3
"""The host's free memory must hold the starting weights this many times, or they are not kept."""


@dataclass(frozen=True, slots=True, eq=False)
class Probe:
    """What is looked at. prompts: distinct, as inference feeds them. decode: the text of tokens, control tokens left
    out. retained: held-out rows of the nearest earlier SFT stage. start: the trained weights at the stage's start, in
    the host's memory; None where it has no room for them."""

    settings: Samples
    prompts: Sequence[Ids]
    stop_ids: Sequence[int]
    decode: Callable[[Sequence[int]], str]
    retained: Sequence[Tree] = ()
    start: Mapping[str, Tensor] | None = field(default=None, repr=False)


def spread(trees: Sequence[Tree], count: int) -> list[Tree]:
    """At most `count` trees, from all over the rows, in their order."""
    return [trees[number * len(trees) // count] for number in range(count)] if len(trees) > count else list(trees)


def distinct_prompts(trees: Sequence[Tree], count: int) -> list[Ids]:
    """At most `count` different prompts, from all over the rows; rows without a prompt have nothing to answer."""
    stride = max(1, len(trees) // count) if count else 1
    found: dict[bytes, Ids] = {}
    for number in sorted(range(len(trees)), key=lambda number: (number % stride, number)):
        if len(found) == count:
            break
        prompt_ids = trees[number].prompt_ids
        if len(prompt_ids):
            found.setdefault(prompt_ids.tobytes(), prompt_ids)
    return list(found.values())


def begun(probe: Probe, model: PreTrainedModel, trainable: Trainable, *, tell: Callable[[str], None]) -> Probe:
    """The probe with the weights that the model has now, and without prompts that leave an answer no room."""
    most = _positions(model) - probe.settings.max_new_tokens
    prompts = [prompt_ids for prompt_ids in probe.prompts if len(prompt_ids) <= most]
    if len(prompts) < len(probe.prompts):
        few = f"{len(prompts)} of {len(probe.prompts)} held-out prompts are answered at evaluations"
        tell(f"{few}: the model has no positions for `samples.max_new_tokens` tokens behind the others")
    if not prompts:
        return replace(probe, prompts=prompts)
    need = sum(weight.numel() * weight.element_size() for weight in trainable.values())
    if _ROOM * need > psutil.virtual_memory().available:
        tell(f"samples: no `sample_kl`, as the memory has no room for the {need:,} bytes of the starting weights")
        return replace(probe, prompts=prompts)
    start = {name: weight.detach().to("cpu", copy=True) for name, weight in trainable.items()}
    return replace(probe, prompts=prompts, start=start)


def _positions(model: PreTrainedModel) -> int:
    """Longest sequence that the model can read; without a limit of its own, a large number."""
    config = model.config.get_text_config().to_dict()
    limit = config.get("max_position_embeddings") or config.get("n_positions")
    return int(limit) if limit else 2**31
