"""Examples and trees in the shape that a method trains on, with the figures that it reads.

In: examples as formats made them, their trees, a stage. Out: examples with the answers that are trained, trees with
scores, labels and weights; BadRow where a figure that the stage reads is missing or malformed.
Must not know: tokenizers, files, losses.

Of several ranked answers the best and the worst make a pair; a pair is two labeled answers, or a ranking of two.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from tunesmith.data.formats import WEIGHT
from tunesmith.data.formats.fields import BadField, number, shown
from tunesmith.data.types import BadRow, Example, Row, Tree
from tunesmith.recipe.preferences import DpoStage, KtoStage, PairedStage, RewardStage
from tunesmith.recipe.stages import RowKind, StageBase

LEAST_RATIO, MOST_RATIO = 1.0, 3 / 2  # of what desirable and undesirable answers count together
BEST_AND_WORST = "of several ranked answers the best and the worst became a pair"
TWO_LABELED = "a pair became two labeled answers, the chosen one desirable"
RANKING_OF_TWO = "a pair became a ranking of two"
UNREAD_WEIGHT = "a `weight` that is not read (`pair_weights: rows` of a paired method reads it)"


@dataclass(frozen=True, slots=True)
class Shape:
    """What a stage trains on. reads_scores: of pairs (rankings always have theirs); reads_weights: of rows;
    mismatched: every tree gets another row's answer beside its own."""

    rows: RowKind = "answers"
    reads_scores: bool = False
    reads_weights: bool = False
    mismatched: bool = False


AS_READ = Shape()
"""Rows as their format made them."""


def shape_of(stage: StageBase) -> Shape:
    """The shape of a stage's rows."""
    reads_scores = isinstance(stage, DpoStage | RewardStage) and stage.margin == "scores"
    reads_weights = isinstance(stage, PairedStage) and stage.pair_weights == "rows"
    return Shape(stage.rows, reads_scores, reads_weights, isinstance(stage, KtoStage))


def shaped_example(
    row: Row, example: Example, shape: Shape, notices: Counter[str], *, is_ranked: bool
) -> Example | BadRow:
    """The example with the answers and figures that the stage trains on; what was made of it is counted.

    `is_ranked`: its scores order its answers; a pair's chosen answer is the first, whatever its scores are.
    """
    try:
        example = replace(example, weight=_weight(row, shape, notices))
    except BadField as error:
        return BadRow(row.id, error.field, error.found, error.wanted, row.sha)
    if shape.rows == "rankings" and not is_ranked:
        notices[RANKING_OF_TWO] += 1
        return replace(example, scores=(1.0, 0.0))  # the file's own may disagree with its choice, or be missing
    if shape.rows == "labels" and example.label is None:
        notices[TWO_LABELED] += 1
    if shape.rows == "pairs" and is_ranked:
        notices[BEST_AND_WORST] += 1
        return best_and_worst(example)
    if shape.rows == "pairs" and shape.reads_scores and not example.scores:
        wanted = "scores of both answers (`chosen_score`, `rejected_score`) or a `margin`: the stage reads them"
        return BadRow(row.id, "chosen_score", "no such key", wanted, row.sha)
    return example


def _weight(row: Row, shape: Shape, notices: Counter[str]) -> float:
    if shape.reads_weights:
        return read_weight(row)
    if shape.rows in ("pairs", "labels", "rankings") and row.fields.get(WEIGHT) is not None:
        notices[UNREAD_WEIGHT] += 1
    return 1.0


def read_weight(row: Row) -> float:
    """How much a row counts, above 0. Raises BadField."""
    value = row.fields.get(WEIGHT)
    if value is None:
        found = "null" if WEIGHT in row.fields else "no such key"
        raise BadField(WEIGHT, found, "a number above 0: the stage says `pair_weights: rows`")
    weight = number(value, WEIGHT)
    if weight <= 0:
        raise BadField(WEIGHT, shown(value), "a number above 0")
    return weight


def best_and_worst(example: Example) -> Example:
    """The pair of a ranking: the first of the highest scores and the last of the lowest."""
    places = range(len(example.scores))
    best = max(places, key=lambda place: (example.scores[place], -place))
    worst = min(places, key=lambda place: (example.scores[place], -place))
    scores = (example.scores[best], example.scores[worst])
    answers = (example.answers[best], example.answers[worst])
    return replace(example, answers=answers, scores=scores)  # type: ignore[arg-type]  # both are of one kind


def shaped_trees(example: Example, trees: Sequence[Tree], shape: Shape) -> tuple[Tree, ...]:
    """The trees of a shaped example, with what the stage reads of the row."""
    if shape.rows == "labels":
        return tuple(labeled for tree in trees for labeled in _labeled(example, tree))
    if shape.rows == "rankings":
        return tuple(replace(tree, scores=example.scores) for tree in trees)
    if shape.rows != "pairs":
        return tuple(trees)
    scores = example.scores if shape.reads_scores else ()
    return tuple(replace(tree, scores=scores, weight=example.weight) for tree in trees)


def _labeled(example: Example, tree: Tree) -> tuple[Tree, ...]:
    """A judged answer as it stands; of a pair, each answer by itself on the prompt that both have."""
    if example.label is not None:
        return (replace(tree, label=example.label),)
    chosen, rejected = tree.branches
    return (
        replace(tree, id=f"{tree.id}#chosen", branches=(chosen,), label=True),
        replace(tree, id=f"{tree.id}#rejected", branches=(rejected,), label=False),
    )


def balance_notes(stage: StageBase, label_G: npt.NDArray[np.float64]) -> list[str]:
    """Advice on KTO's weights where one label outweighs the other: lambda_D n_D : lambda_U n_U outside [1, 3/2].

    The range is that of Ethayarajh et al. 2024 (arXiv:2402.01306), section 4.2 of version 5; the first said 4/3.
    """
    if not isinstance(stage, KtoStage):
        return []
    desirable, undesirable = int((label_G == 1).sum()), int((label_G == 0).sum())
    heavy, light = stage.desirable_weight * desirable, stage.undesirable_weight * undesirable
    if not heavy or not light:
        return []  # that all labels say the same is said where they are read
    ratio = heavy / light
    if LEAST_RATIO <= ratio <= MOST_RATIO:
        return []
    middle = (LEAST_RATIO + MOST_RATIO) / 2
    if ratio < LEAST_RATIO:
        remedy = f"`desirable_weight: {stage.desirable_weight * middle / ratio:.3g}`"
    else:
        remedy = f"`undesirable_weight: {stage.undesirable_weight * ratio / middle:.3g}`"
    return [
        f"WARNING: {desirable} desirable and {undesirable} undesirable answers count {ratio:.3g} : 1, weights "
        f"included; KTO's authors advise 1 to 1.5: set {remedy}."
    ]
