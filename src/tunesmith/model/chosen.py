"""Choosing by name which weights are trained, of those that the kind of tuning trains.

In: a model whose trained weights want a gradient; patterns. Out: the same model, fewer of them. Must not know: stages,
adapters' kinds.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from tunesmith.errors import ModelError

_SHOWN = 3


def choose_trained(model: nn.Module, *, train_only: Sequence[str] = (), freeze: Sequence[str] = ()) -> None:
    """Freeze every trained weight that no pattern of `train_only` matches (empty: all do) or one of `freeze` does.

    A pattern is matched with whole names and with the names of modules that a weight is in; `*` goes over dots. Tied
    weights have several names, and one of them is enough. Raises ModelError where a pattern matches no trained weight
    or none is left.
    """
    if not train_only and not freeze:
        return
    trained: dict[int, tuple[nn.Parameter, list[str]]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            trained.setdefault(id(parameter), (parameter, []))[1].append(name)
    for key, patterns in (("train_only", train_only), ("freeze", freeze)):
        for pattern in patterns:
            if not any(_matches(names, pattern) for _, names in trained.values()):
                raise _matches_nothing(key, pattern, [names[0] for _, names in trained.values()])
    for parameter, names in trained.values():
        wanted = not train_only or any(_matches(names, pattern) for pattern in train_only)
        if not wanted or any(_matches(names, pattern) for pattern in freeze):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter, _ in trained.values()):
        raise ModelError("train_only and freeze leave no weight to train", where="tuning", remedy="Freeze less.")


def _matches(names: Sequence[str], pattern: str) -> bool:
    return any(fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*") for name in names)


def _matches_nothing(key: str, pattern: str, names: Sequence[str]) -> ModelError:
    last = pattern.strip("*.").split(".")[-1]
    near = [name for name in names if last and last in name.split(".")] or list(names)
    return ModelError(
        f"{pattern!r} matches no weight that would be trained",
        where=f"tuning.{key}",
        remedy=f"Names here are such as {', '.join(near[:_SHOWN])}; `*` stands for anything, dots among it.",
    )
