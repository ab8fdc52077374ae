"""Tiny stages for tests of the loop: engine, trees, references, recipe stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.support.models import tiny_model, tiny_reward_model
from tests.support.trees import random_tree
from tunesmith.data.ending import at_end
from tunesmith.data.types import Tree
from tunesmith.engine.engine import Engine
from tunesmith.engine.logprobs import Logprobs
from tunesmith.model.adapters import add_adapter
from tunesmith.model.machine import Machine
from tunesmith.objectives import Objective, Result, Sum, objective_of
from tunesmith.recipe.models import CompletionStage, DpoStage, Full, Lora, SftStage, Source
from tunesmith.recipe.preferences import RewardStage
from tunesmith.recipe.stages import RowKind, StageBase
from tunesmith.runs.folder import StageFolder
from tunesmith.train.loop import References, StageOutcome, train_stage
from tunesmith.train.progress import Observer
from tunesmith.train.step import Batch, num_read, score

VOCABULARY = 96
MACHINE = Machine.cpu()

# Eight rows of unequal length; prompt, branches, untrained tokens at each branch's start.
SHAPES = [
    (3, 9, 4, 0),
    (40, 2, 3, 0),
    (1, 1, 12, 0),
    (7, 20, 5, 2),
    (12, 3, 3, 1),
    (5, 31, 30, 0),
    (2, 4, 1, 0),
    (60, 7, 2, 0),
]


def pair_trees(count: int = 8) -> list[Tree]:
    """Pairs, their shapes from SHAPES in turn."""
    shapes = [SHAPES[number % len(SHAPES)] for number in range(count)]
    return [
        random_tree(prompt, (a, b), vocabulary=VOCABULARY, seed=number, untrained=untrained)
        for number, (prompt, a, b, untrained) in enumerate(shapes)
    ]


def answer_trees(count: int = 8) -> list[Tree]:
    """The same with the first answer alone."""
    return [Tree(tree.id, tree.prompt_ids, tree.branches[:1]) for tree in pair_trees(count)]


def text_trees(count: int = 8) -> list[Tree]:
    """Texts without a prompt: the first token is marked as trained and cannot be."""
    lengths = [3, 17, 2, 40, 9, 5, 28, 11]
    return [random_tree(0, (lengths[number % 8],), vocabulary=VOCABULARY, seed=100 + number) for number in range(count)]


def labeled_trees(count: int = 8) -> list[Tree]:
    """The first answers, two of three desirable, each with a mismatched one beside it: the next row's answer."""
    trees = pair_trees(count)
    return [
        replace(
            tree,
            branches=(tree.branches[0], trees[(number + 1) % count].branches[0]),
            label=number % 3 != 1,
        )
        for number, tree in enumerate(trees)
    ]


def ranked_trees(count: int = 8) -> list[Tree]:
    """Three or four answers a prompt, of unequal length, with scores in no order."""
    trees = []
    for number, tree in enumerate(pair_trees(count)):
        more = random_tree(1, (4, 9)[: 1 + number % 2], vocabulary=VOCABULARY, seed=50 + number).branches
        branches = (*tree.branches, *more)
        scores = tuple(float((7 * number + 3 * place) % 5) + 0.1 * place for place in range(len(branches)))
        trees.append(replace(tree, branches=branches, scores=scores))
    return trees


def lora_engine(*, dropout: float = 0.0, moved: bool = False, family: str = "llama", **config: Any) -> Engine:
    """A tiny model with an adapter; `moved`: its second matrices are not 0 any more, so the policy is not the base."""
    model = tiny_model(family, **config)
    adapted = add_adapter(model, Lora(r=4, dropout=dropout), seed=0)
    inner = adapted.base_model.model
    assert isinstance(inner, PreTrainedModel)
    if moved:
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, parameter in inner.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.05, generator=generator)
    return Engine(inner)


def reward_engine(*, tuning: Lora | Full | None = None, family: str = "llama", **config: Any) -> Engine:
    """A tiny reward model, its head drawn from a seed."""
    model = tiny_reward_model(family, **config)
    if isinstance(tuning, Full):
        return Engine(model)
    adapted = add_adapter(model, tuning or Lora(r=4), seed=0)
    inner = adapted.base_model.model
    assert isinstance(inner, PreTrainedModel)
    return Engine(inner)


def full_engine(family: str = "llama", **config: Any) -> Engine:
    """A tiny model, all of it trained."""
    return Engine(tiny_model(family, **config))


def references_of(engine: Engine, trees: Sequence[Tree]) -> list[np.ndarray]:
    """Log-probs of each tree under the engine's model as it is."""
    batch = Batch(trees)
    training = engine.model.training
    engine.model.eval()
    logprob_N = score(engine, batch, forest_tokens=200, machine=MACHINE)
    engine.model.train(training)
    return [part.numpy() for part in torch.split(logprob_N, [sum(num_read(tree)) for tree in trees])]


def noisy_references(trees: Sequence[Tree]) -> list[np.ndarray]:
    """References that are nobody's, so that margins are far from 0."""
    draw = np.random.default_rng(5)
    return [(-3 * draw.random(sum(num_read(tree)))).astype(np.float32) for tree in trees]


def sft_stage(**changes: Any) -> SftStage:
    """A short SFT stage."""
    values: dict[str, Any] = {"name": "sft", "train": [Source(path="x")], "learning_rate": 1e-2, "batch_size": 4}
    return SftStage(**(values | {"forest_tokens": 90, "tuning": Lora(r=4)} | changes))


def dpo_stage(**changes: Any) -> DpoStage:
    """A short DPO stage."""
    values: dict[str, Any] = {"name": "dpo", "train": [Source(path="x")], "learning_rate": 5e-3, "batch_size": 4}
    return DpoStage(**(values | {"forest_tokens": 90, "tuning": Lora(r=4)} | changes))


def reward_stage(**changes: Any) -> RewardStage:
    """A short stage of a reward model."""
    values: dict[str, Any] = {"name": "rm", "train": [Source(path="x")], "learning_rate": 5e-4, "batch_size": 4}
    return RewardStage(**(values | {"forest_tokens": 90, "tuning": Lora(r=4)} | changes))


def completion_stage(**changes: Any) -> CompletionStage:
    """A short stage of plain text."""
    values: dict[str, Any] = {"name": "text", "train": [Source(path="x")], "learning_rate": 1e-2, "batch_size": 4}
    return CompletionStage(**(values | {"forest_tokens": 90, "tuning": Lora(r=4)} | changes))


def spread_objective() -> Objective:
    """A coupled method made up for tests: the squared distance of each pair's margin from the step's mean margin.

    No tree's loss can be known without all others, so it must go through the two-phase form.
    """

    def function(logprobs: Logprobs) -> Result:
        policy_PK = logprobs.per_branch().view(-1, 2)
        margin_P = policy_PK[:, 0] - policy_PK[:, 1]
        loss = 0.01 * ((margin_P - margin_P.mean()) ** 2).sum()
        return Result(Sum(loss, float(len(margin_P))), {"margin": Sum(margin_P.sum(), float(len(margin_P)))})

    return Objective("spread", function, lambda tree: 1, num_answers=2, separable=False)


@dataclass(frozen=True)
class Trial:
    """A stage in a folder that can be run, broken off and run again, each time from the same start."""

    folder: Path
    stage: StageBase
    family: str = "llama"
    dropout: float = 0.1
    num_train: int = 11

    @property
    def config(self) -> dict[str, int]:
        """Room for the longest rows where positions are learned."""
        return {"n_positions": 128} if self.family == "gpt2" else {}

    def engine(self) -> Engine:
        """A fresh model with the stage's starting weights."""
        if not self.stage.makes_policy:
            tuning = self.stage.tuning
            tuning = tuning.model_copy(update={"dropout": self.dropout}) if isinstance(tuning, Lora) else tuning
            return reward_engine(tuning=tuning, family=self.family, **self.config)
        if isinstance(self.stage.tuning, Full):
            return full_engine(self.family, **self.config)
        return lora_engine(dropout=self.dropout, moved=True, family=self.family, **self.config)

    def run(
        self, observer: Observer | None = None, engine: Engine | None = None, machine: Machine = MACHINE
    ) -> tuple[StageOutcome, Engine]:
        """Run, or go on."""
        engine = engine or self.engine()
        rows: dict[RowKind, Callable[[int], list[Tree]]] = {
            "pairs": pair_trees,
            "text": text_trees,
            "labels": labeled_trees,
            "rankings": ranked_trees,
            "answers": answer_trees,
        }
        trees = rows[self.stage.rows](self.num_train + 4)
        trees = trees if self.stage.makes_policy else [at_end(tree) for tree in trees]
        train, heldout = trees[: self.num_train], trees[self.num_train :]
        references: References | None = None
        objective = objective_of(self.stage)
        if objective.needs_reference:
            references = (references_of(engine, train), references_of(engine, heldout))
        outcome = train_stage(
            engine=engine,
            stage=self.stage,
            objective=objective,
            train=train,
            heldout=heldout,
            replay=text_trees(5) if isinstance(self.stage, SftStage) and self.stage.replay else (),
            references=references,
            folder=StageFolder(self.folder),
            seed=3,
            machine=machine,
            observer=observer,
            inputs={"base": "abc"},
        )
        return outcome, engine


def weights_of(engine: Engine) -> dict[str, Tensor]:
    """Copies of the trained weights."""
    return {name: p.detach().clone() for name, p in engine.model.named_parameters() if p.requires_grad}


def gradients_of(engine: Engine) -> dict[str, Tensor]:
    """Copies of the gradients; the weights' own are dropped."""
    found = {name: p.grad.clone() for name, p in engine.model.named_parameters() if p.grad is not None}
    engine.model.zero_grad(set_to_none=True)
    return found


def assert_gradients_equal(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Every tensor's difference is at most `tolerance` of the tensor's own norm."""
    assert found.keys() == expected.keys()
    largest = max(float(tensor.norm()) for tensor in expected.values())
    assert largest > 0
    for name, tensor in expected.items():
        difference = float((found[name].double() - tensor.double()).norm())
        # a tensor whose gradient is rounding beside the others' (a bias under a softmax) has no relative error
        assert difference <= tolerance * max(float(tensor.norm()), 1e-4 * largest), name
