"""Little languages, rows in them, and stages on them whose records are diagnosed.

What a model writes is sampled before and after each stage, from the model itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tests.support.training import MACHINE, lora_engine, references_of, weights_of
from tunesmith.data.types import Branch, Tree
from tunesmith.diagnosis.base import Curves, Diagnosis, Settings, Table
from tunesmith.diagnosis.diagnose import diagnose
from tunesmith.engine.engine import Engine
from tunesmith.errors import NumericsError
from tunesmith.objectives import objective_of, supervised
from tunesmith.recipe.stages import StageBase
from tunesmith.runs.folder import StageFolder
from tunesmith.runs.records import Record, read_records
from tunesmith.sample.generate import generate
from tunesmith.train.evaluate import evaluate
from tunesmith.train.loop import StageOutcome, train_stage
from tunesmith.train.progress import Silent
from tunesmith.train.step import Batch

STOP, SPLIT, VOCABULARY = 2, 50, 96
"""The stop token; tokens below SPLIT are one language, those from it on another."""
LONGEST = 32
Draw = Callable[[np.random.Generator], Sequence[int]]


def tree(name: str, prompt: Sequence[int], *answers: Sequence[int]) -> Tree:
    branches = tuple(Branch(np.array(ids, np.int32), np.ones(len(ids), np.bool_)) for ids in answers)
    return Tree(name, np.array(prompt, np.int32), branches)


def rows(num: int, seed: int, *answers: Draw) -> list[Tree]:
    """Rows of random prompts, each answer drawn by its function."""
    found = []
    for number in range(num):
        draw = np.random.default_rng([seed, number])
        prompt = draw.integers(4, SPLIT, 5)
        found.append(tree(f"{seed}:{number}", prompt, *(answer(draw) for answer in answers)))
    return found


def one(draw: np.random.Generator) -> Sequence[int]:
    """A short answer in the first language, with its end."""
    return [*draw.integers(4, SPLIT, draw.integers(3, 6)), STOP]


def other(draw: np.random.Generator) -> Sequence[int]:
    """A short answer in the second."""
    return [*draw.integers(SPLIT, VOCABULARY, draw.integers(3, 6)), STOP]


def six(low: int, high: int) -> Draw:
    return lambda draw: draw.integers(low, high, 6).tolist()


@dataclass(frozen=True)
class Trained:
    """A run's folder and model, and what its records show with samples beside them."""

    folder: StageFolder
    stage: StageBase
    engine: Engine
    outcome: StageOutcome | None
    notes: list[str]
    samples: tuple[Record, ...] = ()
    error: NumericsError | None = None

    @property
    def found(self) -> dict[str, Diagnosis]:
        metrics = read_records(self.folder.metrics_path)
        said = {str(line["kind"]): int(str(line["step"])) for line in read_records(self.folder.warnings_path)}
        evaluations: list[Record] = list(read_records(self.folder.eval_path))
        for figures in self.samples:
            at = next((line for line in evaluations if line["step"] == figures["step"]), None)
            if at is None:
                evaluations.append(dict(figures))
            else:
                at.update(figures)
        curves = Curves(Table(metrics), Table(evaluations), said, is_over=True)
        return {each.name: each for each in diagnose(curves, Settings.of(self.stage))}

    @property
    def said(self) -> dict[str, str]:
        """Diagnoses that were said in training."""
        lines = read_records(self.folder.warnings_path)
        return {str(line["kind"]): str(line["text"]) for line in lines if "severity" in line}


@dataclass
class Listener(Silent):
    texts: list[str] = field(default_factory=list)

    def noted(self, text: str) -> None:
        self.texts.append(text)


def train(
    path: Path,
    stage: StageBase,
    rows: Sequence[Tree],
    heldout: Sequence[Tree] = (),
    *,
    engine: Engine | None = None,
    samples: bool = False,
    shift: float = 0.0,
) -> Trained:
    """Train the stage from the engine's weights. `shift`: nats a token by which the reference is wrong."""
    engine = engine or lora_engine(moved=True)
    objective = objective_of(stage)
    references = None
    if objective.needs_reference:
        scored = [references_of(engine, side) for side in (rows, heldout)]
        references = (
            [each + np.float32(shift) for each in scored[0]],
            [each + np.float32(shift) for each in scored[1]],
        )
    start = weights_of(engine)
    before = [{"step": 0, **sampled(engine, start)}] if samples else []
    folder, listener = StageFolder(path), Listener()
    outcome, error = None, None
    try:
        outcome = train_stage(
            engine=engine,
            stage=stage,
            objective=objective,
            train=rows,
            heldout=heldout,
            references=references,
            folder=folder,
            seed=3,
            machine=MACHINE,
            observer=listener,
            inputs={},
        )
    except NumericsError as raised:
        error = raised
    last = len(read_records(folder.metrics_path))
    after = [{"step": last, **sampled(engine, start)}] if samples else []
    return Trained(folder, stage, engine, outcome, listener.texts, (*before, *after), error)


PROMPTS = rows(24, 9)
KEPT = rows(16, 2, one)
"""Held-out rows of the SFT stage."""


def sampled(engine: Engine, start: dict[str, Tensor]) -> Record:
    """What the model writes, and how far that is from what it was at the start."""
    prompts = [each.prompt_ids.tolist() for each in PROMPTS]
    answers = generate(engine.model, prompts, max_new_tokens=LONGEST, stop_ids=[STOP], temperature=1.0)
    grams = [[each.ids[place : place + 4] for place in range(len(each.ids) - 3)] for each in answers]
    written = [
        tree(str(place), prompt, each.all_ids)
        for place, (prompt, each) in enumerate(zip(prompts, answers, strict=True))
    ]
    own = sum(float(part.sum()) for part in references_of(engine, written))
    now = weights_of(engine)
    put(engine, start)
    there = sum(float(part.sum()) for part in references_of(engine, written))
    put(engine, now)
    kept = evaluate(engine, Batch(KEPT), objective=supervised("sft"), forest_tokens=2000, machine=MACHINE)
    return {
        "sample_kl": (own - there) / len(answers),
        "sample_tokens": float(np.mean([len(each.ids) for each in answers])),
        "sample_truncated": float(np.mean([not each.stopped for each in answers])),
        "sample_repetition": float(np.mean([1 - len(set(each)) / len(each) if each else 0 for each in grams])),
        "sample_language": float(np.mean([np.mean(np.array(each.ids) < SPLIT) > 0.5 for each in answers if each.ids])),
        "retained_loss": kept["loss"],
    }


def put(engine: Engine, weights: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in engine.model.named_parameters():
            if name in weights:
                parameter.copy_(weights[name])
