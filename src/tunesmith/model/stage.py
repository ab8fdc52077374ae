"""A stage of a run, loaded for reading: to be asked, scored or merged.

In: a run folder and a stage's name. Out: its model, frozen and in eval mode, with the renderer that trained it.
Must not know: how it is asked, what it is compared with.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tunesmith.data.render import Renderer
from tunesmith.data.template import choose_template
from tunesmith.model.machine import Machine
from tunesmith.model.policy import Policy, policy_for_reading
from tunesmith.model.results import run_recipe_of, stage_weights
from tunesmith.runs.folder import open_run


@dataclass(frozen=True, slots=True, eq=False)
class LoadedStage:
    """A stage ready to answer: `renderer.prompt_ids` renders as in training, `stop_ids` end an answer."""

    name: str
    policy: Policy
    renderer: Renderer
    stop_ids: tuple[int, ...]

    @property
    def model(self) -> PreTrainedModel:
        """The transformers model; where there is an adapter, its linear layers carry it."""
        return self.policy.model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base's tokenizer."""
        return self.policy.tokenizer


def load_stage(
    run: Path, stage: str | None = None, *, machine: Machine | None = None, scores: bool = False
) -> LoadedStage:
    """Load a stage (`base`, a name, or None for the last finished one) on this machine's device.

    `scores`: a reward model, where else it is one that answers prompts; its renderer marks where a score is read.

    Raises RunFolderError where there is no such run or stage, ModelError where its weights cannot be loaded.
    """
    folder = open_run(run)
    recipe = run_recipe_of(folder)
    name, weights = stage_weights(folder, stage, scores=scores)
    device = (machine or Machine.detect(recipe.threads)).device
    policy = policy_for_reading(weights, device=device, scores=scores)
    template = choose_template(policy.tokenizer, recipe.model.chat_template)
    longest = max(each.max_length for each in recipe.stages)
    renderer = Renderer(policy.tokenizer, template, longest, reads_end=scores)
    return LoadedStage(name, policy, renderer, renderer.stop_ids)
