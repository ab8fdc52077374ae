"""Everything of a run that is known before a weight is loaded: tokenizer, template, trees, ledger.

In: a recipe. Out: for every stage its trees, and the notes that a person should read. Raises DataError and
ModelError. Must not know: training, run folders.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tunesmith.data.ledger import Ledger
from tunesmith.data.prepare import Prepared, prepare_stage, stage_renderer
from tunesmith.data.reading import Tell
from tunesmith.data.render import Renderer
from tunesmith.data.template import choose_template
from tunesmith.model.load import load_tokenizer
from tunesmith.recipe.models import Recipe


@dataclass(frozen=True, slots=True, eq=False)
class PreparedRun:
    """A run's stages in trees. `renderers` and `stages` go by the stage's name."""

    renderers: dict[str, Renderer]
    stages: dict[str, Prepared]

    @property
    def renderer(self) -> Renderer:
        """Of the first stage; all stages share tokenizer and template."""
        return next(iter(self.renderers.values()))

    def ledgers(self) -> list[Ledger]:
        """One a stage: together one entry for every row that any stage read."""
        return [prepared.ledger for prepared in self.stages.values()]


def prepare_run(
    recipe: Recipe,
    tell: Tell = lambda text: None,
    *,
    revisions: Mapping[str, Mapping[str, str]] | None = None,
    between: Callable[[], None] = lambda: None,
) -> PreparedRun:
    """Read, split and render the rows of every stage; `tell` is told of progress through large sources.

    `revisions`: by stage and source, the commits of hub data sets that the run has begun on. `between` is called
    between chunks of rows and may raise to stop: what was prepared of large sources is kept for the next start.
    """
    begun = revisions or {}
    tokenizer = load_tokenizer(recipe.model)
    template = choose_template(tokenizer, recipe.model.chat_template)
    renderers = {stage.name: stage_renderer(stage, tokenizer, template) for stage in recipe.stages}
    stages = {
        stage.name: prepare_stage(
            stage,
            renderers[stage.name],
            workers=recipe.data_workers,
            tell=tell,
            revisions=begun.get(stage.name),
            between=between,
        )
        for stage in recipe.stages
    }
    return PreparedRun(renderers, stages)
