"""What a stage's evaluations look at besides the held-out loss: its prompts, and the SFT stage's rows before it.

In: the recipe, its prepared rows, a stage's policy. Out: the probe that the loop is given. Must not know: figures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from tunesmith.data.prepare import Prepared
from tunesmith.data.types import Tree
from tunesmith.recipe.models import Recipe, SftStage, Stage
from tunesmith.recipe.preferences import PreferenceStage, samples_of
from tunesmith.train.probe import RETAINED_ROWS, Probe, distinct_prompts, spread


def retained_rows(recipe: Recipe, index: int, prepared: Mapping[str, Prepared]) -> list[Tree]:
    """Held-out rows of the nearest SFT stage that a preference stage's weights come from; none for other stages."""
    stage = recipe.stages[index]
    if not isinstance(stage, PreferenceStage) or not stage.makes_policy:
        return []
    for earlier in reversed(recipe.stages[:index]):
        if stage.start != "previous":
            return []
        if isinstance(earlier, SftStage):
            return spread(prepared[earlier.name].heldout, RETAINED_ROWS)
        stage = earlier if earlier.makes_policy else stage
    return []


def probe_of(
    stage: Stage,
    heldout: Sequence[Tree],
    retained: Sequence[Tree],
    *,
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: Sequence[int],
) -> Probe | None:
    """The probe of a stage; None where it would look at nothing."""
    settings = samples_of(stage)
    prompts = distinct_prompts(heldout, settings.num_prompts)
    if not prompts and not retained:
        return None
    return Probe(settings, prompts, stop_ids, _decoder(tokenizer), retained)


def _decoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[Sequence[int]], str]:
    def decode(ids: Sequence[int]) -> str:
        text = tokenizer.decode(list(ids), skip_special_tokens=True)
        assert isinstance(text, str)
        return text

    return decode
