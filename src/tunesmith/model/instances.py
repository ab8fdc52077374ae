"""Other forwards for single modules of one model: transformers' classes and functions stay as they are.

In: a module and a function. Out: the module with the function as its forward, until it is taken off.
Must not know: what the forwards compute.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from types import FunctionType, MethodType

from torch import nn


def own_forward(module: nn.Module) -> object:
    """The forward that this very module was given, or None where it has its class's."""
    return module.__dict__.get("forward")


def give_forward(module: nn.Module, function: Callable[..., object]) -> None:
    """Let `function(module, ...)` be the module's forward; hooks and the class's other methods stay."""
    module.__dict__["forward"] = MethodType(function, module)


def drop_forward(module: nn.Module) -> None:
    """Back to the class's forward."""
    module.__dict__.pop("forward", None)


def forward_calling(forward: Callable[..., object], replaced: Mapping[str, object]) -> FunctionType | None:
    """A class's forward, made to call other functions under some names of its file; None where it calls none."""
    if not isinstance(forward, FunctionType) or not set(replaced) & set(forward.__code__.co_names):
        return None
    names = {**forward.__globals__, **replaced}
    twin = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    twin.__kwdefaults__ = forward.__kwdefaults__
    return twin


def file_of(cls: type) -> dict[str, object]:
    """The names of the file that a class was defined in."""
    return vars(sys.modules[cls.__module__])
