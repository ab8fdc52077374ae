"""What the stages are compared on: held-out questions and held-out pairs, in tokens.

In: the resolved recipe and the run's renderer. Out: questions and pairs, and notes on what was left out.
Must not know: models, figures, how answers are made.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from tunesmith.data.prepare import prepare_stage, read_examples, stage_renderer
from tunesmith.data.render import Renderer
from tunesmith.data.shape import best_and_worst
from tunesmith.data.types import Conversation, Example, RowError, Text, Tree
from tunesmith.recipe.models import Recipe, SftStage, Source, StageBase
from tunesmith.recipe.preferences import PreferenceStage
from tunesmith.recipe.stages import RowKind

WRONG_ANSWER = "value"
"""Pairs with the tag `kind: value` set a wrong answer against a right one; they are reported apart."""


@dataclass(frozen=True, slots=True)
class Question:
    """A held-out prompt, ready to be answered. `accepted` is empty where no answer of the row counts as exact."""

    id: str
    prompt_ids: tuple[int, ...]
    text: str
    accepted: tuple[str, ...]
    value: str | None


@dataclass(frozen=True, slots=True)
class Pair:
    """A held-out preference pair. `cluster` is equal for pairs of one prompt."""

    tree: Tree
    cluster: str
    kind: str


@dataclass(frozen=True, slots=True)
class Rows:
    """Everything that is measured on; a reason stands in for what is missing."""

    questions: list[Question]
    pairs: list[Pair]
    notes: list[str] = field(default_factory=list)
    no_questions: str = ""
    no_pairs: str = ""


def compared_rows(recipe: Recipe, renderer: Renderer, *, max_new_tokens: int, max_positions: int | None) -> Rows:
    """The rows that the recipe names, or the held-out rows of its stages.

    Questions: `compare.prompts`; else the held-out rows of the first SFT stage; else the prompts of the last
    stage's. Pairs: `compare.preferences`; else the held-out rows of the last preference stage. A question that
    leaves no room for an answer within `max_positions`, or repeats another, is left out and noted.
    """
    compare = recipe.compare
    notes: list[str] = []
    if compare.prompts:
        asked, no_questions = _examples(compare.prompts), "the files of `compare.prompts` hold no usable prompt"
    else:
        stage = next((stage for stage in recipe.stages if isinstance(stage, SftStage)), recipe.stages[-1])
        asked = _heldout(stage, renderer)
        no_questions = f"stage {stage.name!r} has no held-out rows, and `compare.prompts` is empty"
    room = None if max_positions is None else max_positions - max_new_tokens
    questions = _questions(asked, renderer, limit=compare.num_prompts, room=room, notes=notes)
    preferred, no_pairs = _preferred(recipe, renderer)
    pairs = _pairs(preferred, renderer, notes=notes)
    return Rows(questions, pairs, notes, "" if questions else no_questions, "" if pairs else no_pairs)


def _preferred(recipe: Recipe, renderer: Renderer) -> tuple[list[Example], str]:
    if recipe.compare.preferences:
        return _examples(recipe.compare.preferences, "pairs"), "the files of `compare.preferences` hold no usable pair"
    stages = [stage for stage in recipe.stages if isinstance(stage, PreferenceStage)]
    if not stages:
        return [], "the run has no preference stage, and `compare.preferences` is empty"
    for stage in reversed(stages):  # the file of a stage of labels may hold pairs, or single answers
        if pairs := [example for example in _heldout(stage, renderer) if len(example.answers) > 1]:
            return pairs, ""
    return [], f"stage {stages[-1].name!r} has no held-out pairs, and `compare.preferences` is empty"


def _examples(sources: Sequence[Source], wanted: RowKind | None = None) -> list[Example]:
    return [example for source in sources for example in read_examples(source, wanted).examples]


def _heldout(stage: StageBase, renderer: Renderer) -> list[Example]:
    """The examples that the stage held out; the split is the training's own, asked for again."""
    if not stage.heldout and not stage.heldout_fraction:
        return []
    own = stage_renderer(stage, renderer.tokenizer, renderer.template)
    return list(prepare_stage(stage, own).heldout_examples)


def _questions(
    examples: Sequence[Example], renderer: Renderer, *, limit: int, room: int | None, notes: list[str]
) -> list[Question]:
    questions: list[Question] = []
    seen: set[tuple[int, ...]] = set()
    repeated, too_long, refused = 0, 0, 0
    for example in examples:
        if len(questions) == limit:
            break
        ids = _prompt_ids(example, renderer)
        if not ids:
            refused += 1
        elif ids in seen:
            repeated += 1
        elif room is not None and len(ids) > room:
            too_long += 1
        else:
            seen.add(ids)
            accepted = _accepted(example)
            questions.append(Question(example.id, ids, shown(example.prompt), accepted, example.value))
    _note(notes, repeated, "repeat the prompt of an earlier one")
    _note(notes, too_long, "leave no room for an answer within the model's positions")
    _note(notes, refused, "have no prompt that can be rendered")
    return questions


def _note(notes: list[str], count: int, what: str) -> None:
    if count:
        notes.append(f"{count} of the rows {what}; they were left out.")


def _prompt_ids(example: Example, renderer: Renderer) -> tuple[int, ...]:
    try:
        return tuple(int(token) for token in renderer.prompt_ids(example.prompt, example.tools))
    except RowError:
        return ()


def _accepted(example: Example) -> tuple[str, ...]:
    """The answers that count as exact, stripped: the row's `accepted`, else its one answer (its first turn)."""
    if example.accepted:
        return tuple(text.strip() for text in example.accepted)
    if len(example.answers) != 1:
        return ()  # of a pair, neither answer is the right one
    answer = example.answers[0]
    text = answer if isinstance(answer, str) else answer[0].content
    return (text.strip(),) if text.strip() else ()


def _pairs(examples: Sequence[Example], renderer: Renderer, *, notes: list[str]) -> list[Pair]:
    examples = [best_and_worst(each) if len(each.answers) > 2 and each.scores else each for each in examples]
    pairs: list[Pair] = []
    refused = 0
    for example, rendered in zip(examples, renderer.render_many(examples), strict=True):
        trees = [tree for tree in rendered.trees if len(tree.branches) == 2]
        refused += not trees
        for tree in trees:
            cluster = hashlib.sha256(tree.prompt_ids.astype("<i4").tobytes()).hexdigest()
            pairs.append(Pair(tree, cluster, example.tags.get("kind", "")))
    _note(notes, refused, "of the pairs' files cannot be rendered as a pair")
    return pairs


def shown(prompt: Conversation | Text) -> str:
    """A prompt as a person reads it: the one user turn alone, else every turn under its role."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and prompt[0].role == "user":
        return prompt[0].content
    return "\n\n".join(f"{message.role}: {message.content}" for message in prompt)


def branch_lengths(pair: Pair) -> tuple[int, int]:
    """Trained tokens of the chosen and the rejected answer."""
    chosen, rejected = (int(np.count_nonzero(branch.trained)) for branch in pair.tree.branches)
    return chosen, rejected
