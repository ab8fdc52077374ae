"""What the commands about data work on: sources, a stage's renderer, a model's tokenizer and template.

In: words of the command line. Out: what they mean, or an error that names them. Heavy imports stay inside functions.
Must not know: what is done with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.errors import DataError, RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tunesmith.data.render import Renderer
    from tunesmith.data.shape import Shape
    from tunesmith.data.show import PickedRows
    from tunesmith.data.template import ChatTemplate
    from tunesmith.recipe.models import Model, Recipe, Source, Stage

QUICKSTART_MODEL = "embedded:quickstart/model"
NO_LIMIT = 2**31 - 1  # a file alone has no stage whose `max_length` could drop its rows


def is_recipe(target: str) -> bool:
    """Whether a word means a recipe: a YAML file, or the name of a shipped one where there is no such file."""
    if Path(target).suffix.lower() in (".yaml", ".yml"):
        return True
    from tunesmith.recipe.resources import shipped_recipes

    return not Path(target).exists() and target in shipped_recipes()


def is_run(path: str) -> bool:
    """Whether a word means a run's ledger: a run folder, or the file in it."""
    from tunesmith.runs.folder import RunFolder

    return Path(path).name == "ledger.parquet" or RunFolder(Path(path)).ledger_path.is_file()


def source_of(path: str) -> Source:
    """A word as a source of a recipe, with that one's defaults."""
    if not path.strip():
        raise DataError("no file is named", remedy="Give a file, a folder, a pattern or a Hugging Face data set id.")
    from tunesmith.recipe.models import Source

    return Source(path=path)


def tokenizer_and_template(model: Model) -> tuple[PreTrainedTokenizerBase, ChatTemplate, list[str]]:
    """A model's tokenizer and template, and what a person should know of both."""
    from tunesmith.data.template import choose_template
    from tunesmith.model.load import load_extended_tokenizer

    tokenizer, added = load_extended_tokenizer(model)
    template = choose_template(tokenizer, model.chat_template)
    facts = [f"tokenizer of {model.path}, {len(tokenizer):,} tokens; chat template: {template.name}"]
    return tokenizer, template, [*facts, *(note for note in (template.note, added.note) if note)]


@dataclass(frozen=True, slots=True)
class View:
    """What rows are shown with: their sources, renderer and shape of the stage, what a person should know of them."""

    renderer: Renderer
    sources: tuple[Source, ...]  # those that rows are shown of
    others: tuple[Source, ...]  # those that a row may be asked for by its id
    facts: tuple[str, ...]
    shape: Shape


def view_of(target: str, *, stage: str | None, model: str | None, template: str | None) -> View:
    """A file with a model's tokenizer, or a recipe's stage. Raises as reading and loading them do."""
    if is_recipe(target):
        return _recipe_view(target, stage=stage, model=model, template=template)
    if stage is not None:
        raise RecipeError("--stage names a stage of a recipe, and this is a source of rows", where=target)
    from tunesmith.data.shape import AS_READ
    from tunesmith.data.sources import open_source
    from tunesmith.recipe.models import Model

    source = source_of(target)
    open_source(source)  # a file that is not there is said before the tokenizer is loaded
    facts = [] if model else [f"No --model given: shown with the tokenizer of {QUICKSTART_MODEL}, a tiny one."]
    facts.append("No recipe, so no max_length: no row is too long here.")
    renderer = _renderer(Model(path=model or QUICKSTART_MODEL, chat_template=template), None, facts)
    return View(renderer, (source,), (), tuple(facts), AS_READ)


def _recipe_view(target: str, *, stage: str | None, model: str | None, template: str | None) -> View:
    from tunesmith.data.shape import shape_of
    from tunesmith.recipe.load import load_named
    from tunesmith.recipe.models import SftStage

    recipe = load_named(target).recipe
    chosen = _stage(recipe, stage)
    names = ", ".join(each.name for each in recipe.stages)
    facts = [f"recipe {recipe.name}, stage {chosen.name} ({chosen.method}); its stages: {names}"]
    given = {key: value for key, value in (("path", model), ("chat_template", template)) if value is not None}
    renderer = _renderer(recipe.model.model_copy(update=given), chosen, facts)
    replay = chosen.replay.sources if isinstance(chosen, SftStage) and chosen.replay else []
    shape = shape_of(chosen)
    if shape.mismatched:
        facts.append("When it is trained, another row's answer stands beside each, to read the drift on; not shown.")
    return View(renderer, tuple(chosen.train), (*chosen.heldout, *replay), tuple(facts), shape)


def _stage(recipe: Recipe, name: str | None) -> Stage:
    for stage in recipe.stages:
        if name in (None, stage.name):
            return stage
    from tunesmith.recipe.problems import nearest

    names = [stage.name for stage in recipe.stages]
    what = f"the recipe has no stage {name!r}{nearest(str(name), names)}"
    raise RecipeError(what, where=recipe.name, remedy=f"Its stages: {', '.join(names)}.")


def _renderer(model: Model, stage: Stage | None, facts: list[str]) -> Renderer:
    """The renderer of a stage, or one without limits; what it is like is added to the facts."""
    from tunesmith.data.prepare import stage_renderer
    from tunesmith.data.render import Renderer

    tokenizer, template, said = tokenizer_and_template(model)
    facts += said
    if stage is None:
        return Renderer(tokenizer, template, NO_LIMIT)
    train_on = f", train_on {stage.train_on}" if stage.method == "sft" else ""
    facts.append(f"max_length {stage.max_length:,}, too_long {stage.too_long}{train_on}")
    return stage_renderer(stage, tokenizer, template)


def find_row(view: View, row: str) -> tuple[Source, PickedRows]:
    """The source that has the row. Raises DataError where several could be meant, or none has it."""
    from tunesmith.data.show import NoSuchRowError, pick_rows

    if row.isdecimal():
        if len(view.sources) > 1:
            remedy = f"Give the row's id, for example {view.sources[0].path}:{row}."
            raise DataError(f"the stage has {len(view.sources)} sources, so row {row} could be of each", remedy=remedy)
        return view.sources[0], pick_rows(view.sources[0], row=row)
    everywhere = (*view.sources, *view.others)
    named = [source for source in everywhere if Path(source.path).name in row]
    problem: NoSuchRowError | None = None
    for source in named or everywhere:
        try:
            return source, pick_rows(source, row=row)
        except NoSuchRowError as error:
            problem = error
    assert problem is not None
    raise problem
