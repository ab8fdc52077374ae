"""Where a number was lost: which rows, which token, which module, which weights.

In: a step that gave a log-prob, loss or gradient that is not finite, as everything that it was computed from.
Out: what a second pass over its forests finds. Must not know: files, the loop, what follows from it.

The second pass computes what the first did (the same forests, dropout and precision) with every module watched, and
changes nothing: weights, gradients, modes and generators are as before, whatever happens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from tunesmith.data.types import Tree
from tunesmith.engine.engine import Engine
from tunesmith.engine.forest import build_forest
from tunesmith.engine.retry import Budget, is_out_of_memory
from tunesmith.model.machine import Machine
from tunesmith.objectives import Objective
from tunesmith.train.optim import Trainable, gradient_norm
from tunesmith.train.step import Batch, LostNumberError, Micro, accumulate, judge, micro_batches, num_read

Kind = Literal["log-prob", "loss", "gradient"]

_SHOWN = 10
"""Names of rows and tensors that are kept; the rest are counted."""


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """A step, as everything that its gradient is computed from; the weights are in the engine's model."""

    engine: Engine
    batch: Batch
    objective: Objective
    budget: Budget
    machine: Machine
    seed_key: str
    trainable: Trainable


@dataclass(frozen=True, slots=True)
class Place:
    """A token: `token` counts in the answer from 0, and in the prompt where `answer` is None."""

    row: str
    answer: int | None
    token: int
    token_id: int

    def __str__(self) -> str:
        part = "the prompt" if self.answer is None else f"answer {self.answer + 1}"
        return f"token {self.token + 1} (id {self.token_id}) of {part} of {self.row}"


@dataclass(frozen=True, slots=True)
class Finding:
    """What was lost and where it began.

    rows: those that lost it themselves. forest_rows: all of the forests that they were computed in. place: the first
    token. module: the first module with an output that is not finite, and cause: what can be said of its input and
    weights. tensors: trained tensors that are not finite, or whose gradients are not, in the backward's order.
    came_back: whether the second pass lost it too; None where there could be none.
    """

    kind: Kind
    what: str
    rows: tuple[str, ...] = ()
    forest_rows: tuple[str, ...] = ()
    place: Place | None = None
    module: str = ""
    cause: str = ""
    tensors: tuple[str, ...] = ()
    num_tensors: int = 0
    came_back: bool | None = None

    def __str__(self) -> str:
        """In a few sentences."""
        parts = [self.what]
        if self.module:
            parts.append(f"It began in {self.module}: {self.cause}.")
        elif self.cause:
            parts.append(f"{self.cause[0].upper()}{self.cause[1:]}.")
        if self.place is not None:
            parts.append(f"First at {self.place}.")
        if self.tensors:
            more = f" and {self.num_tensors - 1} more" if self.num_tensors > 1 else ""
            parts.append(f"Not finite: the gradient of {self.tensors[0]}{more}.")
        if self.came_back is False:
            parts.append("It did not come back in a second pass over the same rows: it comes and goes.")
        return " ".join(parts)


@dataclass(slots=True)
class _Seen:
    """The first module that gave a number that is none; `flat`: the first such token of its output."""

    module: str = ""
    cause: str = ""
    flat: int | None = None
    num_tokens: int = 0


def examine(case: Case, kind: Kind, what: str, *, logprob_N: Tensor, trees: Sequence[int] = ()) -> Finding:
    """Look into a lost number; `trees`: numbers of the rows that are known to have lost it."""
    base = Finding(kind, what, rows=tuple(case.batch.trees[number].id for number in trees))
    try:
        if kind == "log-prob":
            return _examine_forward(case, base, logprob_N)
        return _examine_loss(case, base, logprob_N) if kind == "loss" else _examine_gradient(case, base)
    except (RuntimeError, MemoryError) as error:  # the second pass must never hide what the first one found
        if not is_out_of_memory(error):
            raise
        return replace(base, cause="memory ran out while it was looked into")


def _examine_forward(case: Case, base: Finding, logprob_N: Tensor) -> Finding:
    rank, micro = _first_lost(case, logprob_N)
    seen = _Seen()
    with torch.no_grad(), _watched(case.engine.model, seen), case.machine.seeded(_key(case, rank, micro)):
        again_N = case.engine.logprobs(micro.batch.trees, case.objective.wants).logprob_N
    lost = np.flatnonzero(~np.isfinite(logprob_N[micro.places_N].cpu().numpy()))
    first = _first_answers(case.batch.trees, micro)
    place = _token_of(micro.batch.trees, first, int(lost[0]))
    came_back = not _is_finite(again_N)
    cause = seen.cause
    if came_back and not seen.module:
        cause = "every module's output is finite; it began in the head, or in its log-softmax"
    if seen.flat is not None and case.engine.backend != "plain":
        place = _flat_place(micro.batch.trees, first, seen.flat, seen.num_tokens) or place
    forest_rows = tuple(dict.fromkeys(tree.id for tree in micro.batch.trees))
    return replace(base, forest_rows=forest_rows, place=place, module=seen.module, cause=cause, came_back=came_back)


def _examine_loss(case: Case, base: Finding, logprob_N: Tensor) -> Finding:
    """The log-probs are finite, the loss is not: the reference's, or the objective itself."""
    references = case.batch.references
    rows = [tree.id for number, tree in enumerate(case.batch.trees) if _is_lost_reference(references, number)]
    cause = "the reference's log-probs are not finite" if rows else "the objective makes it of finite log-probs"
    if not rows and case.objective.separable:
        parts_N = torch.split(logprob_N, [sum(num_read(tree)) for tree in case.batch.trees])
        alone = [judge(case.batch.part([number]), part_N, case.objective) for number, part_N in enumerate(parts_N)]
        pairs = zip(case.batch.trees, alone, strict=True)
        rows = [tree.id for tree, result in pairs if not _is_finite(result.loss.total)]
    again = judge(case.batch, logprob_N, case.objective)
    return replace(base, rows=tuple(rows), cause=cause, came_back=not _is_finite(again.loss.total))


def _is_lost_reference(references: Sequence[np.ndarray] | None, number: int) -> bool:
    return references is not None and not bool(np.isfinite(references[number]).all())


def _examine_gradient(case: Case, base: Finding) -> Finding:
    """Log-probs and loss are finite, a gradient is not: which forest's, and which tensor's first."""
    lost = [name for name, weight in case.trainable.items() if not _is_finite(weight)]
    if lost:
        return replace(base, cause=f"the weights are not finite themselves, the first is {lost[0]}")
    if case.machine.world_size > 1:
        return base
    names: dict[int, list[str]] = {}
    with _watched_gradients(case.trainable, names):
        came_back = compute_again(case)[0] is not None
    if not names:
        return replace(base, came_back=came_back)
    micros = list(_micros(case, case.machine))
    forests = [micros[number].batch.trees for number in sorted(names) if number < len(micros)]
    rows = tuple(dict.fromkeys(tree.id for trees in forests for tree in trees))
    first = names[min(names)]
    tensors = tuple(first[:_SHOWN])
    return replace(base, forest_rows=rows, tensors=tensors, num_tensors=len(first), came_back=came_back)


def compute_again(case: Case) -> tuple[Kind | None, str]:
    """What is lost when the step is computed anew (None: nothing), and in which words; no gradient is left."""
    assert all(weight.grad is None for weight in case.trainable.values())
    try:
        result = accumulate(
            case.engine,
            case.batch,
            objective=case.objective,
            forest_tokens=case.budget.forest_tokens,
            tree_tokens=case.budget.tree_tokens,
            machine=case.machine,
            seed_key=case.seed_key,
        )
        loss, norm = result.loss.mean(), gradient_norm(case.trainable.values())
        return lost_kind(loss, norm), f"loss {loss}, gradient norm {norm}"
    except LostNumberError as error:
        return "log-prob", error.what
    finally:
        for weight in case.trainable.values():
            weight.grad = None


def lost_kind(loss: float, norm: float) -> Kind | None:
    """Which of the two is no number."""
    if not np.isfinite(loss):
        return "loss"
    return None if np.isfinite(norm) else "gradient"


def _first_lost(case: Case, logprob_N: Tensor) -> tuple[int, Micro]:
    """The first forest, over the ranks, with a log-prob that is not finite, and the rank that computed it."""
    for rank in range(case.machine.world_size):
        for micro in _micros(case, replace(case.machine, rank=rank)):
            if not _is_finite(logprob_N[micro.places_N]):
                return rank, micro
    raise AssertionError("no log-prob is lost")


def _micros(case: Case, machine: Machine) -> Iterator[Micro]:
    return micro_batches(case.batch, case.budget.forest_tokens, machine, tree_tokens=case.budget.tree_tokens)


def _key(case: Case, rank: int, micro: Micro) -> str:
    return f"{case.seed_key}/{rank}/{micro.number}"


@contextmanager
def _watched(model: nn.Module, seen: _Seen) -> Iterator[None]:
    """Note the first module whose output is not finite. Modules end after their parts, so it is the innermost."""

    def hook(name: str) -> Callable[[nn.Module, object, object, object], None]:
        def look(module: nn.Module, inputs: object, keywords: object, output: object) -> None:
            lost = None if seen.module else next((each for each in _floats(output) if not _is_finite(each)), None)
            if lost is None:
                return
            seen.module = name or type(model).__name__
            seen.cause = _cause(module, [*_floats(inputs), *_floats(keywords)])
            if lost.ndim == 3 and lost.shape[0] == 1:
                tokens_T = (~torch.isfinite(lost[0])).any(-1)
                seen.flat, seen.num_tokens = int(tokens_T.nonzero()[0, 0]), lost.shape[1]

        return look

    handles = [module.register_forward_hook(hook(name), with_kwargs=True) for name, module in model.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _cause(module: nn.Module, inputs: Sequence[Tensor]) -> str:
    own = [(name, weight) for name, weight in module.named_parameters(recurse=False) if weight.is_floating_point()]
    for name, weight in own:
        count = int((~torch.isfinite(weight)).sum())
        if count:
            return f"{count} numbers of its {name} are not finite"
    if any(not _is_finite(tensor) for tensor in inputs):
        return "its input is not finite already, and comes from no module (attention, or a function between modules)"
    if not any(True for _ in module.children()):
        return "its input and its own weights are finite"
    return "its parts' outputs are finite, what it makes of them is not"


def _is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _floats(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _floats(each)
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _floats(each)


@contextmanager
def _watched_gradients(trainable: Trainable, names: dict[int, list[str]]) -> Iterator[None]:
    """Note the tensors whose gradients are not finite, in the backward's order, by the number of the forest."""
    passes = dict.fromkeys(trainable, 0)

    def hook(name: str, weight: nn.Parameter) -> torch.utils.hooks.RemovableHandle:
        def look(gradient: Tensor) -> None:
            if not _is_finite(gradient):
                names.setdefault(passes[name], []).append(name)
            passes[name] += 1

        handle: torch.utils.hooks.RemovableHandle = weight.register_hook(look)
        return handle

    handles = [hook(name, weight) for name, weight in trainable.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _first_answers(trees: Sequence[Tree], micro: Micro) -> list[int]:
    """The number, in its row, of the first answer of each tree of a micro-batch: where memory was short, one of them
    stands for a row's answer."""
    if not micro.split:
        return [0] * len(micro.batch.trees)
    pairs = zip(micro.split, micro.batch.trees, strict=True)
    return [
        next(
            place for place, each in enumerate(trees[number].branches) if np.array_equal(each.ids, one.branches[0].ids)
        )
        for number, one in pairs
    ]


def _token_of(trees: Sequence[Tree], first: Sequence[int], number: int) -> Place:
    """The trained token that the log-prob `number` of a forest is of."""
    for tree, answer in zip(trees, first, strict=True):
        for index, length in enumerate(num_read(tree)):
            if number >= length:
                number -= length
                continue
            branch = tree.branches[index]
            token = int(np.flatnonzero(branch.trained)[number + int(branch.trained.sum()) - length])
            return Place(tree.id, answer + index, token, int(branch.ids[token]))
    raise AssertionError("no such trained token")


def _flat_place(trees: Sequence[Tree], first: Sequence[int], flat: int, num_tokens: int) -> Place | None:
    """The token at a place of a forest's flat sequence; None where the tensor is not of all the forest's tokens."""
    forest = build_forest(trees)
    if forest.num_tokens != num_tokens:
        return None
    for tree, answer, span in zip(trees, first, forest.spans, strict=True):
        if not span.start <= flat < span.stop:
            continue
        token_id = int(forest.input_ids_T[flat])
        for index, (start, length) in enumerate(span.branch_starts()):
            if start <= flat < start + length:
                return Place(tree.id, answer + index, flat - start, token_id)
        return Place(tree.id, None, flat - span.start, token_id)
    return None
