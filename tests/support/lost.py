"""Numbers that are lost on purpose: a token that breaks the forward or the backward pass wherever it is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tests.support.training import MACHINE, VOCABULARY, references_of, sft_stage
from tests.support.trees import random_tree
from tunesmith.data.types import Branch, Tree
from tunesmith.engine.engine import Engine
from tunesmith.model.machine import Machine
from tunesmith.objectives import objective_of
from tunesmith.recipe.models import DpoStage, SftStage
from tunesmith.runs.folder import StageFolder
from tunesmith.train.loop import StageOutcome, train_stage
from tunesmith.train.progress import Observer

BAD_ID = VOCABULARY - 1
MODULE = "model.layers.0.post_attention_layernorm"


def clean_trees(count: int, *, num_answers: int = 1) -> list[Tree]:
    """Rows without the bad token: 4 tokens of prompt, 6 an answer."""
    return [random_tree(4, (6,) * num_answers, vocabulary=BAD_ID, seed=number) for number in range(count)]


def with_bad_token(tree: Tree, *, answer: int = 0, token: int = 2) -> Tree:
    """The row with the bad token at a place of one of its answers."""
    branches = list(tree.branches)
    ids = branches[answer].ids.copy()
    ids[token] = BAD_ID
    branches[answer] = Branch(ids, branches[answer].trained)
    return Tree(tree.id, tree.prompt_ids, tuple(branches))


@dataclass
class Loser:
    """Loses a number where the bad token is read: in a module's output, or only in its gradient.

    `times`: only in so many passes of a forest that holds the token, the first ones; None: always.
    """

    place: Literal["forward", "backward"] = "forward"
    times: int | None = None
    mask: list[Tensor] = field(default_factory=list)
    seen: int = 0

    def watch(self, model: nn.Module, module: str = MODULE) -> Loser:
        """Attach to the model."""
        model.get_submodule("model.embed_tokens").register_forward_hook(self._read)
        model.get_submodule(module).register_forward_hook(self._lose)
        return self

    def _read(self, _module: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        self.mask = [(inputs[0] == BAD_ID)[..., None]]

    def _lose(self, _module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        (mask,) = self.mask
        if not bool(mask.any()) or mask.shape[1] != output.shape[1]:
            return output
        self.seen += 1
        if self.times is not None and self.seen > self.times:
            return output
        if self.place == "forward":
            return torch.where(mask, torch.inf, output)
        return output + torch.where(mask, (output - output.detach()).abs().sqrt(), 0.0)  # 0, with a slope of infinity


def train(
    engine: Engine,
    trees: Sequence[Tree],
    folder: Path,
    *,
    stage: SftStage | DpoStage | None = None,
    observer: Observer | None = None,
    machine: Machine = MACHINE,
    heldout: Sequence[Tree] = (),
    **changes: Any,
) -> StageOutcome:
    """A stage on these rows, in their engine as it is."""
    stage = stage or sft_stage(**changes)
    references = None
    if isinstance(stage, DpoStage):
        references = (references_of(engine, trees), [])
    return train_stage(
        engine=engine,
        stage=stage,
        objective=objective_of(stage),
        train=trees,
        heldout=heldout,
        references=references,
        folder=StageFolder(folder),
        seed=3,
        machine=machine,
        observer=observer,
    )
