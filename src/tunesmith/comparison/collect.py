"""What each stage says and thinks: its answers to the questions, and its log-probs of the pairs.

In: the run's stages, loaded one after another. Out: one record of raw material a stage.
Must not know: shares, intervals, reports.

Only one model is in memory at a time, and every model is loaded once: the reference comes last, because it also
scores the answers that the other stages have drawn.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from tunesmith.comparison.rows import Pair, Question, Rows
from tunesmith.data.types import Branch, Tree
from tunesmith.engine.engine import Backend, Engine
from tunesmith.engine.parity import checked_engine
from tunesmith.engine.scoring import score
from tunesmith.model.stage import LoadedStage
from tunesmith.recipe.models import Compare
from tunesmith.sample.generate import Answer, generate

FOREST_TOKENS = 4096
"""Tokens scored at a time; it changes time and memory only."""


@dataclass(slots=True)
class StageRecord:
    """Raw material of one stage, in the order of the questions and pairs.

    greedy, sampled, drawn: answers taken greedily, at the recipe's temperature, and at temperature 1.
    own, reference: summed log-prob of each drawn answer under the stage itself and under the reference, in nats.
    pairs: summed log-prob of (chosen, rejected).
    """

    name: str
    greedy: list[Answer] = field(default_factory=list)
    sampled: list[Answer] = field(default_factory=list)
    drawn: list[Answer] = field(default_factory=list)
    greedy_text: list[str] = field(default_factory=list)
    sampled_text: list[str] = field(default_factory=list)
    own: list[float] = field(default_factory=list)
    reference: list[float] = field(default_factory=list)
    pairs: list[tuple[float, float]] = field(default_factory=list)


def collect(
    names: Sequence[str],
    reference: str | None,
    *,
    load: Callable[[str], LoadedStage],
    rows_of: Callable[[LoadedStage], Rows],
    compare: Compare,
    seed: int,
    say: Callable[[str], None],
) -> tuple[list[StageRecord], Rows]:
    """Records of the stages `names`, in their order, and the rows that they were made on.

    `rows_of` is asked once, with the first stage that is loaded: all stages share tokenizer and template.
    """
    order = [name for name in names if name != reference] + [name for name in names if name == reference]
    records: dict[str, StageRecord] = {}
    rows: Rows | None = None
    backend: Backend | None = None
    for name in order:
        say(f"{name}: loading")
        stage = load(name)
        rows = rows_of(stage) if rows is None else rows
        backend = _backend(stage, rows) if backend is None else backend
        records[name] = record_stage(stage, rows, compare=compare, seed=seed, backend=backend, say=say)
        if name == reference:
            say(f"{name}: scoring every stage's samples")
            for record in records.values():
                record.reference = _score_answers(stage, rows.questions, record.drawn, backend=backend)
        del stage
        gc.collect()
    assert rows is not None
    return [records[name] for name in names], rows


def record_stage(
    stage: LoadedStage, rows: Rows, *, compare: Compare, seed: int, backend: Backend, say: Callable[[str], None]
) -> StageRecord:
    """The answers and log-probs of one loaded stage."""
    record = StageRecord(stage.name)
    if backend == "plain":  # such a model would take the padding of a batch into its state
        compare = compare.model_copy(update={"batch_size": 1})
    if rows.questions:
        say(f"{stage.name}: answering {len(rows.questions)} prompts")
        record.greedy = _answers(stage, rows.questions, compare=compare, temperature=None, seed=seed)
        record.greedy_text = [decoded(stage, answer) for answer in record.greedy]
        if compare.style is not None:
            record.sampled = _answers(
                stage, rows.questions, compare=compare, temperature=compare.temperature, seed=seed
            )
            record.sampled_text = [decoded(stage, answer) for answer in record.sampled]
        record.drawn = _answers(stage, rows.questions, compare=compare, temperature=1.0, seed=seed + 1)
        record.own = _score_answers(stage, rows.questions, record.drawn, backend=backend)
    if rows.pairs:
        say(f"{stage.name}: scoring {len(rows.pairs)} pairs")
        record.pairs = _score_pairs(stage, rows.pairs, backend=backend)
    return record


def decoded(stage: LoadedStage, answer: Answer) -> str:
    """The answer's text. Control tokens inside it stay visible: an answer with one is not an exact answer."""
    text = stage.tokenizer.decode(list(answer.ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text.strip()


def answer_tree(question: Question, answer: Answer) -> Tree:
    """The question with the drawn answer as its one branch; the stop token is part of what was drawn."""
    ids = np.array(answer.all_ids, dtype=np.int32)
    return Tree(
        question.id, np.array(question.prompt_ids, dtype=np.int32), (Branch(ids, np.ones(len(ids), dtype=np.bool_)),)
    )


def _answers(
    stage: LoadedStage, questions: Sequence[Question], *, compare: Compare, temperature: float | None, seed: int
) -> list[Answer]:
    return generate(
        stage.model,
        [question.prompt_ids for question in questions],
        max_new_tokens=compare.max_new_tokens,
        stop_ids=stage.stop_ids,
        temperature=temperature,
        seed=seed,
        batch_size=compare.batch_size,
    )


def _backend(stage: LoadedStage, rows: Rows) -> Backend:
    """The engine that suits this model, on these rows: the check that every training starts with."""
    trees = [pair.tree for pair in rows.pairs] or [
        answer_tree(question, Answer(question.prompt_ids[:1] * 2, None)) for question in rows.questions
    ]
    return checked_engine(stage.model, trees)[0].backend if trees else "sdpa"


def _score_answers(
    stage: LoadedStage, questions: Sequence[Question], answers: Sequence[Answer], *, backend: Backend
) -> list[float]:
    trees = [answer_tree(question, answer) for question, answer in zip(questions, answers, strict=True)]
    if not trees:
        return []
    scores = score(Engine(stage.model, backend), trees, forest_tokens=FOREST_TOKENS)
    return [float(values.sum(dtype=np.float64)) for values in scores]


def _score_pairs(stage: LoadedStage, pairs: Sequence[Pair], *, backend: Backend) -> list[tuple[float, float]]:
    trees = [pair.tree for pair in pairs]
    scores = score(Engine(stage.model, backend), trees, forest_tokens=FOREST_TOKENS)
    sums: list[tuple[float, float]] = []
    for tree, values in zip(trees, scores, strict=True):
        split = len(values) - int(tree.branches[1].trained[0 if len(tree.prompt_ids) else 1 :].sum())
        sums.append((float(values[:split].sum(dtype=np.float64)), float(values[split:].sum(dtype=np.float64))))
    return sums
